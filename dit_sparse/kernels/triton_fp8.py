"""Block-sparse attention in 8 bits, in Triton; see :mod:`dit_sparse.kernels.fp8`.

For GPUs whose tensor cores multiply e4m3: Ada, Hopper, Blackwell. On Hopper block lists in query
blocks of 128 go to the kernel in Gluon.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from dit_sparse.kernels.flash4_attention import skipped_part
from dit_sparse.kernels.fp8 import KEY_BLOCK
from dit_sparse.kernels.ops import FP8, Attended, AttentionCall, Impl
from dit_sparse.kernels.triton_common import (
    LOG2_E,
    RANK,
    capability,
    ceil_div,
    gluon_module,
    gluon_reasons,
    last_contiguous,
    padded_dim,
    refusals,
)
from dit_sparse.kernels.triton_launch import launch_kernel
from dit_sparse.kernels.triton_mask import list_steps, lists_of
from dit_sparse.kernels.triton_merge import merge_into
from dit_sparse.kernels.triton_padding import validity
from dit_sparse.kernels.triton_quantize import quantize
from dit_sparse.kernels.triton_softmax import listed_counts


@triton.jit
def _attend_blocks(
    acc,
    denom,
    peak,
    q,
    k,
    v,
    indices,
    key_valid,
    k_scale,
    q_factor,
    first,
    last,
    kv_len,
    v_step,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LISTED: tl.constexpr,
    MASKED: tl.constexpr,
    VALUES_8: tl.constexpr,
):
    """Adds the listed blocks ``first..last`` to the running softmax ``(acc, denom, peak)``."""
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    NEG_INF: tl.constexpr = float("-inf")
    OFFSET: tl.constexpr = 8.0 if VALUES_8 else 0.0
    tokens = tl.arange(0, TILE_K)
    dims = tl.arange(0, DIM_PAD)
    for n in range(first * SPLIT, last * SPLIT):
        block = n // SPLIT
        if LISTED:
            block = tl.load(indices + block)
        start = block.to(tl.int64) * BLOCK_K + (n % SPLIT) * TILE_K
        inside = (dims < DIM)[None, :]
        if MASKED:
            keep = start + tokens < kv_len  # [TILE_K]
            if key_valid is not None:
                keep = tl.load(key_valid + start + tokens, mask=keep, other=0) != 0
            inside = keep[:, None] & inside
        keys = tl.load(k + (start + tokens)[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        factor = q_factor * tl.load(k_scale + block)
        scores = tl.dot(q, tl.trans(keys))  # [TILE_Q, TILE_K]
        if MASKED:
            scores = tl.where(keep[None, :], scores, NEG_INF)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shift = new_peak
        if MASKED:
            # A row that has seen no key yet: -inf minus -inf would be NaN.
            shift = tl.where(new_peak == NEG_INF, 0.0, new_peak)
        weights = tl.exp2(scores * factor[:, None] - (shift - OFFSET)[:, None])
        decay = tl.exp2(peak - shift)
        denom = denom * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if VALUES_8:
            # [DIM_PAD, TILE_K]: 0 past the last key, and padded to whole tiles.
            at = v + dims.to(tl.int64)[:, None] * v_step + (start + tokens)[None, :]
            values = tl.load(at, mask=(dims < DIM)[:, None], other=0.0)
            # Products of 8 bits are summed with 14 bits on Hopper: only within a tile.
            acc = tl.dot(
                weights.to(values.dtype), tl.trans(values), acc, max_num_imprecise_acc=TILE_K
            )
        else:
            at = v + (start + tokens)[:, None] * v_step + dims[None, :]
            values = tl.load(at, mask=inside, other=0.0)
            acc = tl.dot(weights.to(values.dtype), values, acc)
        peak = new_peak
    return acc, denom, peak


@triton.jit
def _attention_fp8_fwd_kernel(
    q,  # [batch, heads, q_len, DIM] e4m3
    k,  # [batch, heads, kv_len, DIM] e4m3
    v,  # [batch, kv_len, heads, dim]; with VALUES_8 [batch, heads, DIM, padded] e4m3
    out,  # [batch, q_len, heads, dim], contiguous
    lse,  # [batch, heads, q_len] fp32, contiguous
    counts,  # [batch | 1, heads | 1, mask rows] int32, or None
    indices,  # [batch | 1, heads | 1, mask rows, list_len] int32, or None
    key_valid,  # [batch, kv_len] uint8, or None
    valid_prefix,  # [batch] int32, or None
    q_scale,  # [batch, heads, q_len] fp32
    k_scale,  # [batch, heads, kv_blocks] fp32
    v_scale,  # [batch, heads, DIM] fp32, or None
    lift,  # [batch, heads, q_len] fp32
    v_batch,
    v_head,
    v_step,  # from token to token; with VALUES_8 from channel to channel
    mask_batch,
    mask_head,
    list_len,
    heads,
    q_len,
    kv_len,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEEDS_MASK: tl.constexpr,
    VALUES_8: tl.constexpr,
):
    LISTED: tl.constexpr = indices is not None
    LN_2: tl.constexpr = 0.6931471805599453
    OFFSET: tl.constexpr = 8.0 if VALUES_8 else 0.0
    tile = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    batch = plane // heads
    head = plane % heads
    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_PAD)
    live = rows < q_len
    at_q = live[:, None] & (dims < DIM)[None, :]
    lines = plane * q_len + rows
    queries = tl.load(q + lines[:, None] * DIM + dims[None, :], mask=at_q, other=0.0)
    q_factor = tl.load(q_scale + lines, mask=live, other=1.0) * scale_log2

    inside = kv_len // BLOCK_K
    if valid_prefix is not None:
        inside = tl.load(valid_prefix + batch) // BLOCK_K
    mask_row = batch * mask_batch + head * mask_head + (tile * TILE_Q) // BLOCK_Q
    if LISTED:
        indices += mask_row * list_len
    count, unmasked = listed_counts(
        counts, indices, mask_row, inside, LISTED, NEEDS_MASK, tl.cdiv(kv_len, BLOCK_K)
    )
    if key_valid is not None:
        key_valid += batch * kv_len
    k += plane * kv_len * DIM
    k_scale += plane * tl.cdiv(kv_len, BLOCK_K)
    v += batch * v_batch + head * v_head
    step = tl.cast(v_step, tl.int64)

    acc = tl.zeros([TILE_Q, DIM_PAD], dtype=tl.float32)
    denom = tl.zeros([TILE_Q], dtype=tl.float32)
    peak = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    acc, denom, peak = _attend_blocks(
        acc, denom, peak, queries, k, v, indices, key_valid, k_scale, q_factor, 0, unmasked,
        kv_len, step, DIM, DIM_PAD, TILE_K, BLOCK_K, LISTED, False, VALUES_8,
    )  # fmt: skip
    if NEEDS_MASK:
        acc, denom, peak = _attend_blocks(
            acc, denom, peak, queries, k, v, indices, key_valid, k_scale, q_factor, unmasked,
            count, kv_len, step, DIM, DIM_PAD, TILE_K, BLOCK_K, LISTED, True, VALUES_8,
        )  # fmt: skip
    empty = denom == 0.0
    denom = tl.where(empty, 1.0, denom)
    natural = (peak + tl.log2(denom) - OFFSET) * LN_2
    natural += tl.load(lift + lines, mask=live, other=0.0)
    tl.store(lse + lines, tl.where(empty, float("-inf"), natural), mask=live)
    acc = acc / denom[:, None]
    if VALUES_8:
        acc = acc * tl.load(v_scale + plane * DIM + dims, mask=dims < DIM, other=0.0)[None, :]
    out_rows = ((batch * q_len + rows) * heads + head) * DIM
    tl.store(out + out_rows[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=at_q)


def launch(call: AttentionCall) -> Attended:
    """Runs the kernel on kept blocks; a summary is not looked at.

    Returns:
        ``out [batch, q_len, heads, dim]`` and ``lse [batch, heads, q_len]`` fp32.
    """
    assert call.v is not None
    batch, q_len, heads, dim = call.q.shape
    kv_len = call.k.shape[1]
    out = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty((batch, heads, q_len), dtype=torch.float32)
    operands = quantize(call)
    v = last_contiguous(call.v)
    v_steps = (v.stride(0), v.stride(2), v.stride(1))
    if operands.v is not None:
        v = operands.v
        v_steps = (v.stride(0), v.stride(1), v.stride(2))
    block = (64, KEY_BLOCK) if call.mask is None else call.mask.block
    counts = indices = None
    list_places = (0, 0, 0)
    if call.mask is not None:
        counts, indices = lists_of(call.mask)
        list_places = list_steps(call.mask)
    flags, prefix = validity(call.key_valid)
    # Fixed rather than tuned at the first call, which would stall a user's first step.
    # Wider ones spill in the loops of consumer Blackwell.
    widest = 32 if dim > 64 and capability(call.q)[0] == 12 else 64
    tile_q, tile_k = min(128 if dim > 64 else 64, block[0]), min(widest, block[1])
    launch_kernel(
        _attention_fp8_fwd_kernel, (ceil_div(q_len, tile_q), batch * heads),
        (operands.q, operands.k, v, out, lse, counts, indices, flags, prefix,
         operands.q_scale, operands.k_scale, operands.v_scale, operands.lift),
        (*v_steps, *list_places, heads, q_len, kv_len, call.scale * LOG2_E),
        DIM=dim, DIM_PAD=max(32, padded_dim(dim)), TILE_Q=tile_q, TILE_K=tile_k,
        BLOCK_Q=block[0], BLOCK_K=block[1],
        NEEDS_MASK=flags is not None or kv_len % block[1] != 0,
        VALUES_8=operands.v is not None,
        num_warps=8 if dim > 64 else 4, num_stages=2,
    )  # fmt: skip
    return Attended(out, lse)


def hopper_reasons(call: AttentionCall) -> list[str]:
    """Why ``call`` cannot be computed by the Gluon kernel for Hopper; empty if it can."""
    return gluon_reasons("attention_fp8", call)


def launch_hopper(call: AttentionCall) -> Attended:
    """:func:`launch` by the kernel in Gluon, where ``hopper_reasons`` are none."""
    return gluon_module("attention_fp8").launch(call)


def capability_reasons(call: AttentionCall) -> list[str]:
    """Why the device of ``call`` has no products of 8 bits; empty if it has."""
    if torch.version.hip is not None:
        return ["8-bit products were written for NVIDIA; this is ROCm"]
    found = capability(call.q)
    if found >= (8, 9):
        return []
    return [
        f"8-bit products need compute capability 8.9 or newer, got {found[0]}.{found[1]}; use "
        "attention_precision='model'"
    ]


class TritonFp8(Impl):
    """Summaries are a second pass in the operands' dtype, merged by the log-sum-exp."""

    op, name, rank = "attention", "triton", RANK
    summaries = True
    precisions = FP8

    def reasons(self, call: AttentionCall) -> list[str]:
        reasons = refusals(call.q, None if call.mask is None else call.mask.block)
        # Only asked of a device that exists: the others were refused above.
        reasons += [] if reasons else capability_reasons(call)
        if call.q.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"8-bit products take bfloat16 and float16, got {call.q.dtype}")
        if call.q.shape[-1] > 128:
            reasons.append(f"8-bit products take head dims up to 128, got {call.q.shape[-1]}")
        if call.scale <= 0:
            reasons.append(f"scale must be positive, got {call.scale}")
        if call.q.numel() == 0 or call.k.numel() == 0:
            reasons.append("8-bit products take no empty sequence")
        return reasons

    def __call__(self, call: AttentionCall) -> Attended:
        # Neither of the two looks at the summary.
        is_hopper = call.keep("fp8", lambda call: not hopper_reasons(call))
        kept = launch_hopper(call) if is_hopper else launch(call)
        if call.summary is None or call.mask is None:
            return kept
        whole = merge_into(kept, skipped_part(replace(call, precision="model")))
        return Attended(whole.out, whole.lse, kept.lse)
