"""Rounding the operands of attention to 8 bits, in Triton; see :mod:`dit_sparse.kernels.fp8`.

Queries and keys are read once. What is subtracted from keys comes from a sample of them, so that
no pass for their mean is needed; the scale of values is a channel's, which needs one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.fp8 import E4M3, LARGEST, SAMPLES, SMALLEST, key_block
from dit_sparse.kernels.ops import AttentionCall
from dit_sparse.kernels.triton_common import ceil_div, last_contiguous, padded_dim
from dit_sparse.kernels.triton_launch import launch_kernel
from dit_sparse.mask import block_count

# Programs that share the sample of one head.
_PARTS = 8
_VALUE_TILE = 128
_PEAK_TOKENS = 1024
# As kernels read them.
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST = tl.constexpr(SMALLEST)


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Operands in 8 bits.

    Attributes:
        q: ``[batch, heads, q_len, dim]`` e4m3.
        q_scale: Of each query, ``[batch, heads, q_len]`` fp32.
        lift: What the scores of a row lack, scale included, ``[batch, heads, q_len]`` fp32.
        k: ``[batch, heads, kv_len, dim]`` e4m3, shifted; 0 where keys do not exist.
        k_scale: Of each block, ``[batch, heads, kv_blocks]`` fp32.
        v: ``[batch, heads, dim, padded kv_len]`` e4m3, transposed, 0 where keys do not exist; or
            None, where values stay as they are.
        v_scale: Of each channel, ``[batch, heads, dim]`` fp32.
    """

    q: Tensor
    q_scale: Tensor
    lift: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor | None
    v_scale: Tensor | None


@triton.jit
def _finite(x):
    """``x`` with 0 for what is not finite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _positive(largest):
    """The scale of a group whose largest magnitude is ``largest``."""
    return tl.where(largest < _SMALLEST, 1.0, largest / _LARGEST)


@triton.jit
def _sample_kernel(
    k,  # [batch, kv_len, heads, dim]
    key_valid,  # [batch, kv_len] uint8, or None
    sums,  # [batch, heads, PARTS, DIM] fp32
    counts,  # [batch, heads, PARTS] fp32
    k_batch,
    k_token,
    k_head,
    heads,
    kv_len,
    samples,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    part = tl.program_id(0)
    plane = tl.program_id(1)
    batch = (plane // heads).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    k += batch * k_batch + (plane % heads).to(tl.int64) * k_head
    total = tl.zeros([DIM_PAD], tl.float32)
    found = 0.0
    for start in range(part * TILE, samples, PARTS * TILE):
        place = start + tl.arange(0, TILE)
        token = place.to(tl.int64) * kv_len // samples
        exists = place < samples
        if key_valid is not None:
            exists = tl.load(key_valid + batch * kv_len + token, mask=exists, other=0) != 0
        at = k + token[:, None] * k_token + dims[None, :]
        x = tl.load(at, mask=exists[:, None] & (dims < DIM)[None, :], other=0.0)
        total += tl.sum(_finite(x.to(tl.float32)), 0)
        found += tl.sum(exists.to(tl.float32), 0)
    row = plane.to(tl.int64) * PARTS + part
    tl.store(sums + row * DIM + dims, total, mask=dims < DIM)
    tl.store(counts + row, found)


@triton.jit
def _shift(sums, counts, plane, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PARTS: tl.constexpr):
    """What is subtracted from the keys of a head, ``[DIM_PAD]``."""
    dims = tl.arange(0, DIM_PAD)
    rows = plane.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    parts = tl.load(sums + rows[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0)
    return tl.sum(parts, 0) / tl.maximum(tl.sum(tl.load(counts + rows), 0), 1.0)


@triton.jit
def _round_queries(
    q, shift, out, scales, lift, tile, plane, q_token, q_len, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM_PAD)
    live = rows < q_len
    inside = live[:, None] & (dims < DIM)[None, :]
    x = tl.load(q + rows.to(tl.int64)[:, None] * q_token + dims[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    step = _positive(tl.max(tl.abs(x), 1))
    at = plane.to(tl.int64) * q_len + rows
    tl.store(lift + at, scale * tl.sum(x * shift[None, :], 1), mask=live)
    tl.store(scales + at, step, mask=live)
    rounded = (x / step[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * DIM + dims[None, :], rounded, mask=inside)


@triton.jit
def _round_keys(
    k, key_valid, shift, out, scales, block, blocks, plane, k_token, kv_len,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM_PAD)
    live = tokens < kv_len
    exists = live
    if key_valid is not None:
        exists = tl.load(key_valid + tokens, mask=live, other=0) != 0
    inside = (dims < DIM)[None, :]
    at = k + tokens.to(tl.int64)[:, None] * k_token + dims[None, :]
    x = tl.load(at, mask=exists[:, None] & inside, other=0.0).to(tl.float32)
    x = tl.where(exists[:, None] & inside, x - shift[None, :], 0.0)
    step = _positive(tl.max(tl.max(tl.abs(x), 1), 0))
    tl.store(scales + plane * blocks + block, step)
    rounded = (x / step).to(out.dtype.element_ty)
    rows = plane.to(tl.int64) * kv_len + tokens
    tl.store(out + rows[:, None] * DIM + dims[None, :], rounded, mask=live[:, None] & inside)


@triton.jit
def _queries_keys_kernel(
    q,  # [batch, q_len, heads, dim]
    k,  # [batch, kv_len, heads, dim]
    key_valid,  # [batch, kv_len] uint8, or None
    sums,
    counts,
    q_out,  # [batch, heads, q_len, DIM] e4m3
    q_scales,  # [batch, heads, q_len] fp32
    lift,  # as q_scales
    k_out,  # [batch, heads, kv_len, DIM] e4m3
    k_scales,  # [batch, heads, kv_blocks] fp32
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    heads,
    q_len,
    kv_len,
    q_tiles,
    scale,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Heads of the same tokens lie side by side in memory, hence are read at the same time.
    plane = tl.program_id(0)
    tile = tl.program_id(1)
    batch = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    shift = _shift(sums, counts, plane, DIM, DIM_PAD, PARTS)
    if tile < q_tiles:
        q += batch * q_batch + head * q_head
        _round_queries(
            q, shift, q_out, q_scales, lift, tile, plane, q_token, q_len, scale,
            DIM, DIM_PAD, BLOCK,
        )  # fmt: skip
    else:
        k += batch * k_batch + head * k_head
        flags = key_valid
        if key_valid is not None:
            flags = key_valid + batch * kv_len
        _round_keys(
            k, flags, shift, k_out, k_scales, tile - q_tiles, tl.num_programs(1) - q_tiles, plane,
            k_token, kv_len, DIM, DIM_PAD, BLOCK,
        )  # fmt: skip


@triton.jit
def _value_peaks_kernel(
    v,  # [batch, kv_len, heads, dim]
    key_valid,  # [batch, kv_len] uint8, or None
    peaks,  # [batch, heads, DIM] fp32, zeros
    v_batch,
    v_token,
    v_head,
    heads,
    kv_len,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
):
    plane = tl.program_id(1)
    batch = (plane // heads).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    v += batch * v_batch + (plane % heads).to(tl.int64) * v_head
    largest = tl.zeros([DIM_PAD], tl.float32)
    first = tl.program_id(0) * TOKENS
    for start in range(first, tl.minimum(first + TOKENS, kv_len), TILE):
        tokens = start + tl.arange(0, TILE)
        exists = tokens < kv_len
        if key_valid is not None:
            exists = tl.load(key_valid + batch * kv_len + tokens, mask=exists, other=0) != 0
        at = v + tokens.to(tl.int64)[:, None] * v_token + dims[None, :]
        x = tl.load(at, mask=exists[:, None] & (dims < DIM)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(_finite(tl.abs(x.to(tl.float32))), 0))
    tl.atomic_max(peaks + plane.to(tl.int64) * DIM + dims, largest, mask=dims < DIM)


@triton.jit
def _values_kernel(
    v,  # [batch, kv_len, heads, dim]
    key_valid,  # [batch, kv_len] uint8, or None
    peaks,  # [batch, heads, DIM] fp32
    out,  # [batch, heads, DIM, padded] e4m3
    scales,  # [batch, heads, DIM] fp32
    v_batch,
    v_token,
    v_head,
    heads,
    kv_len,
    padded,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    plane = tl.program_id(1)
    batch = (plane // heads).to(tl.int64)
    first = tl.program_id(0) * TILE
    place = tl.arange(0, TILE)
    dims = tl.arange(0, DIM_PAD)
    token = place
    if FRAGMENTS:
        # Where a thread of a warp group holds columns of the scores; see the kernel for Hopper.
        token = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    token = first + token
    exists = token < kv_len
    if key_valid is not None:
        exists = tl.load(key_valid + batch * kv_len + token, mask=exists, other=0) != 0
    v += batch * v_batch + (plane % heads).to(tl.int64) * v_head
    at = v + token.to(tl.int64)[:, None] * v_token + dims[None, :]
    x = tl.load(at, mask=exists[:, None] & (dims < DIM)[None, :], other=0.0).to(tl.float32)
    channel = plane.to(tl.int64) * DIM + dims
    step = _positive(tl.load(peaks + channel, mask=dims < DIM, other=0.0))
    if first == 0:
        tl.store(scales + channel, step, mask=dims < DIM)
    rounded = tl.trans((x / step[None, :]).to(out.dtype.element_ty))
    at = out + channel[:, None] * padded + (first + place)[None, :]
    tl.store(at, rounded, mask=(dims < DIM)[:, None])


def quantize(call: AttentionCall, fragments: bool = False) -> Quantized:
    """The operands of ``call`` in 8 bits, as its precision says.

    Args:
        call: With keys.
        fragments: Whether values come in the order in which the threads of a warp group hold the
            weights: of every 16 tokens, place ``4 t + b`` has token ``8 (b // 2) + 2 t + b % 2``.
    """
    q, k = last_contiguous(call.q), last_contiguous(call.k)
    batch, q_len, heads, dim = q.shape
    kv_len, block = k.shape[1], key_block(call)
    planes, shape = batch * heads, {"DIM": dim, "DIM_PAD": padded_dim(dim)}
    flags = None if call.key_valid is None else call.key_valid.contiguous().view(torch.uint8)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, heads, *sizes, dtype=dtype, device=q.device)

    sums, counts = empty(_PARTS, dim), empty(_PARTS)
    q8, k8 = empty(q_len, dim, dtype=E4M3), empty(kv_len, dim, dtype=E4M3)
    q_scale, lift, k_scale = empty(q_len), empty(q_len), empty(block_count(kv_len, block))
    v8 = v_scale = None
    q_steps, k_steps = q.stride()[:3], k.stride()[:3]
    launch_kernel(
        _sample_kernel, (_PARTS, planes), (k, flags, sums, counts),
        (*k_steps, heads, kv_len, min(kv_len, SAMPLES)),
        **shape, PARTS=_PARTS, TILE=64, num_warps=4,
    )  # fmt: skip
    q_tiles = ceil_div(q_len, block)
    launch_kernel(
        _queries_keys_kernel, (planes, q_tiles + k_scale.shape[2]),
        (q, k, flags, sums, counts, q8, q_scale, lift, k8, k_scale),
        (*q_steps, *k_steps, heads, q_len, kv_len, q_tiles, call.scale),
        **shape, PARTS=_PARTS, BLOCK=block, num_warps=4 if block == 64 else 8,
    )  # fmt: skip
    if call.precision == "fp8_qkpv":
        assert call.v is not None
        v = last_contiguous(call.v)
        tiles = ceil_div(kv_len, _VALUE_TILE)
        v8, v_scale = empty(dim, tiles * _VALUE_TILE, dtype=E4M3), empty(dim)
        peaks = torch.zeros_like(v_scale)
        launch_kernel(
            _value_peaks_kernel, (ceil_div(kv_len, _PEAK_TOKENS), planes), (v, flags, peaks),
            (*v.stride()[:3], heads, kv_len),
            **shape, TOKENS=_PEAK_TOKENS, TILE=64, num_warps=4,
        )  # fmt: skip
        launch_kernel(
            _values_kernel, (tiles, planes), (v, flags, peaks, v8, v_scale),
            (*v.stride()[:3], heads, kv_len, tiles * _VALUE_TILE),
            **shape, TILE=_VALUE_TILE, FRAGMENTS=fragments, num_warps=8,
        )  # fmt: skip
    return Quantized(q8, q_scale, lift, k8, k_scale, v8, v_scale)
