"""Attention inside the partial blocks of a neighborhood, in Triton.

The kernel goes on where attention over the full blocks stopped: it takes that result as the state
of its online softmax, adds the visible pairs of the listed blocks and writes the result in place.
So full blocks run on the best kernel there is, without a rule, and rows without partial blocks
cost nothing. Whether a pair is visible takes two comparisons an axis, of the place of the key with
the bounds of the query; stride, dilation, causality and borders are already in those.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dit_sparse.kernels.ops import Attended, Impl, NeighborhoodCall
from dit_sparse.kernels.triton_common import (
    LOG2_E,
    RANK,
    capability,
    ceil_div,
    last_contiguous,
    padded_dim,
    refusals,
)
from dit_sparse.kernels.triton_launch import launch_kernel
from dit_sparse.kernels.triton_padding import validity
from dit_sparse.kernels.triton_softmax import online_softmax


class Config(NamedTuple):
    """Launch parameters; the tiles divide the mask's blocks.

    Attributes:
        tile_q: Queries per program.
        tile_k: Keys per loop iteration.
        warps: Warps per program.
        stages: Depth of the software pipeline of loads.
    """

    tile_q: int
    tile_k: int
    warps: int
    stages: int


@triton.jit
def _within(keep, place, low, high):
    """``keep`` and the test of one axis, ``[TILE_Q, TILE_K]``."""
    return keep & (place[None, :] >= low[:, None]) & (place[None, :] < high[:, None])


@triton.jit
def _neighborhood_fwd_kernel(
    q,  # [batch, tokens, heads, dim]
    k,  # as q
    v,  # as q
    out,  # [batch, tokens, heads, dim], contiguous; read and written
    lse,  # [batch, heads, tokens] fp32, contiguous; read and written
    counts,  # [mask rows] int32
    indices,  # [mask rows, list_len] int32
    place,  # [axes, tokens] int32
    low,  # [axes, tokens] int32
    high,  # [axes, tokens] int32
    key_valid,  # [batch, tokens] uint8, or None
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    list_len,
    heads,
    tokens,
    video,
    scale_log2,
    AXES: tl.constexpr,  # restricted axes, 1 to 3
    TEXT: tl.constexpr,  # whether a listed block may hold text
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    NEG_INF: tl.constexpr = float("-inf")
    LOG_2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    tile = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)

    mask_row = (tile * TILE_Q) // BLOCK_Q
    count = tl.load(counts + mask_row)
    if count == 0:
        return
    indices += mask_row.to(tl.int64) * list_len

    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_PAD)
    live = rows < tokens
    at_q = live[:, None] & (dims < DIM)[None, :]
    q += batch64 * q_batch + head64 * q_head
    queries = tl.load(q + rows.to(tl.int64)[:, None] * q_token + dims[None, :], mask=at_q, other=0)
    # Rows past the end see nothing.
    low_0 = tl.load(low + rows, mask=live, other=0)
    high_0 = tl.load(high + rows, mask=live, other=0)
    if AXES > 1:
        low_1 = tl.load(low + tokens + rows, mask=live, other=0)
        high_1 = tl.load(high + tokens + rows, mask=live, other=0)
    if AXES > 2:
        low_2 = tl.load(low + 2 * tokens + rows, mask=live, other=0)
        high_2 = tl.load(high + 2 * tokens + rows, mask=live, other=0)

    out_at = out + (((batch64 * tokens + rows) * heads + head) * DIM)[:, None] + dims[None, :]
    lse_at = lse + (batch64 * heads + head) * tokens + rows
    # The state after the full blocks: a softmax whose output is normalised has denominator 1.
    peak = tl.load(lse_at, mask=live, other=NEG_INF) * LOG_2_E
    denom = tl.where(peak == NEG_INF, 0.0, 1.0)
    acc = tl.load(out_at, mask=at_q, other=0).to(tl.float32)

    k += batch64 * k_batch + head64 * k_head
    v += batch64 * v_batch + head64 * v_head
    if key_valid is not None:
        key_valid += batch64 * tokens
    # 64-bit, so that token * stride cannot overflow.
    k_stride = tl.cast(k_token, tl.int64)
    v_stride = tl.cast(v_token, tl.int64)
    lanes = tl.arange(0, TILE_K)
    for n in range(0, count * SPLIT):
        keys_at = tl.load(indices + n // SPLIT) * BLOCK_K + (n % SPLIT) * TILE_K + lanes
        exists = keys_at < tokens
        at_0 = tl.load(place + keys_at, mask=exists, other=-1)
        real = exists
        if key_valid is not None:
            real = tl.load(key_valid + keys_at, mask=exists, other=0) != 0
        at_k = real[:, None] & (dims < DIM)[None, :]
        key_rows = k + keys_at.to(tl.int64)[:, None] * k_stride + dims[None, :]
        keys = tl.load(key_rows, mask=at_k, other=0)  # [TILE_K, DIM_PAD]
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [TILE_Q, TILE_K]
        seen = _within(live[:, None], at_0, low_0, high_0)
        if AXES > 1:
            at_1 = tl.load(place + tokens + keys_at, mask=exists, other=-1)
            seen = _within(seen, at_1, low_1, high_1)
        if AXES > 2:
            at_2 = tl.load(place + 2 * tokens + keys_at, mask=exists, other=-1)
            seen = _within(seen, at_2, low_2, high_2)
        if TEXT:
            seen = seen | (keys_at >= video)[None, :]
        scores = tl.where(seen & real[None, :], scores, NEG_INF)
        weights, decay, denom, peak = online_softmax(scores, peak, denom, scale_log2, True)
        # Values of masked keys must be 0, since 0 * NaN is NaN.
        value_rows = v + keys_at.to(tl.int64)[:, None] * v_stride + dims[None, :]
        values = tl.load(value_rows, mask=at_k, other=0)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")

    empty = denom == 0.0
    denom = tl.where(empty, 1.0, denom)
    natural = tl.where(empty, NEG_INF, (peak + tl.log2(denom)) * LN_2)
    tl.store(lse_at, natural, mask=live)
    tl.store(out_at, (acc / denom[:, None]).to(out.dtype.element_ty), mask=at_q)


def default_config(call: NeighborhoodCall) -> Config:
    """Launch parameters for ``call``, before they are cut to the mask's blocks."""
    dim = padded_dim(call.q.shape[-1])
    if call.q.dtype == torch.float32:
        # "ieee" products run on the FMA units with operands in registers: larger tiles spill.
        return Config(32, 32, 8, 1) if dim <= 64 else Config(16, 16, 8, 1)
    if dim == 256:
        # 68 KiB of shared memory fit the 99 KiB of consumer cards.
        return Config(64, 32, 8, 2)
    # 8 warps: the bounds of the queries and the rule take registers beside the accumulator.
    if capability(call.q)[0] >= 10:
        # On Blackwell wider tiles spill in the loop.
        return Config(128, 32, 8, 2)
    return Config(128, 64, 8, 2)


def launch(call: NeighborhoodCall, config: Config | None = None) -> Attended:
    """Runs the kernel; overwrites ``call.seen``.

    Args:
        call: The call.
        config: Launch parameters; ``default_config`` if None.
    """
    q, k, v = (last_contiguous(x) for x in (call.q, call.k, call.v))
    batch, tokens, heads, dim = q.shape
    if call.seen is None:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.full((batch, heads, tokens), float("-inf"), device=q.device)
    else:
        out, lse = call.seen.out.contiguous(), call.seen.lse.contiguous()
    config = config or default_config(call)
    block = call.partial.block
    tile_q, tile_k = min(config.tile_q, block[0]), min(config.tile_k, block[1])
    flags, _ = validity(call.key_valid)
    indices = call.partial.kv_indices.contiguous()
    launch_kernel(
        _neighborhood_fwd_kernel, (ceil_div(tokens, tile_q), batch * heads),
        (q, k, v, out, lse, call.partial.kv_num_blocks.contiguous(), indices,
         call.mask.place, call.mask.low, call.mask.high, flags),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         indices.shape[-1], heads, tokens, call.mask.video, call.scale * LOG2_E),
        AXES=call.mask.place.shape[0],
        # Blocks of text alone are full: only where video ends inside a block do they mix.
        TEXT=call.mask.video < tokens and call.mask.video % block[1] != 0,
        DIM=dim, DIM_PAD=padded_dim(dim),
        TILE_Q=tile_q, TILE_K=tile_k, BLOCK_Q=block[0], BLOCK_K=block[1],
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return Attended(out, lse)


class TritonNeighborhood(Impl):
    op, name, rank = "neighborhood", "triton", RANK

    def reasons(self, call: NeighborhoodCall) -> list[str]:
        reasons = refusals(call.q, call.partial.block)
        if call.scale <= 0:
            reasons.append(f"scale must be positive, got {call.scale}")
        return reasons

    def __call__(self, call: NeighborhoodCall) -> Attended:
        return launch(call)
