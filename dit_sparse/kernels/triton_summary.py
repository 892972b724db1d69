"""Summaries of key blocks in Triton: making them in one pass, and adding them inside attention.

Source: see :mod:`dit_sparse.kernels.summary`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dit_sparse.kernels.ops import Impl, SummarizeCall
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.kernels.triton_common import RANK, ceil_div, last_contiguous, padded_dim, refusals
from dit_sparse.kernels.triton_launch import Launch
from dit_sparse.mask import block_count

# Partial sums of the slope: enough programs to fill a card, few enough to add up cheaply.
_SLOPE_PROGRAMS = 512
# Entries of the slope that a program adds up.
_PLACES = 256


@triton.jit
def add_summaries(
    acc,
    denom,
    peak,
    q,
    key_mean,  # first block of this batch element and head
    value_mean,
    count,  # [kv_blocks] fp32 of this batch element
    bits,  # packed mask row in 32-bit words
    slope,  # [dim, dim] of this batch element and head in the queries' dtype, or None
    columns,
    stride,  # elements between blocks of key_mean and value_mean
    scale,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_C: tl.constexpr,
    FEW_REGISTERS: tl.constexpr,  # rather than loads ahead, see the caller
):
    """Adds the summaries of the skipped blocks of one mask row to ``(acc, denom, peak)``."""
    NEG_INF: tl.constexpr = float("-inf")
    dims = tl.arange(0, DIM_PAD)
    tail = denom * 0.0
    for start in tl.range(0, columns, TILE_C, num_stages=1 if FEW_REGISTERS else None):
        column = start + tl.arange(0, TILE_C)
        inside = column < columns
        word = tl.load(bits + column // 32, mask=inside, other=0)
        size = tl.load(count + column, mask=inside, other=0.0)
        counts = (size > 0.0) & (((word >> (column % 32)) & 1) == 0)
        bias = tl.where(counts, tl.log2(tl.where(counts, size, 1.0)), NEG_INF)
        at = column[:, None] * stride + dims[None, :]
        load_mask = inside[:, None] & (dims < DIM)[None, :]
        keys = tl.load(key_mean + at, mask=load_mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2 + bias[None, :]
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf minus -inf would be NaN.
        shift = tl.where(new_peak == NEG_INF, 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        added = tl.sum(weights, 1)
        denom = denom * decay + added
        tail = tail * decay + added
        values = tl.load(value_mean + at, mask=load_mask, other=0.0)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        peak = new_peak
    if slope is not None:
        matrix = tl.load(
            slope + dims[:, None] * DIM + dims[None, :],
            mask=(dims < DIM)[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        # acc is not normalised yet: the share of the skipped blocks is tail / denom.
        weight = (tail * scale)[:, None]
        if FEW_REGISTERS:
            # Scaled behind the product queries stay in shared memory.
            acc += tl.dot(q, matrix, input_precision="ieee") * weight
        else:
            weighted = (q.to(tl.float32) * weight).to(q.dtype)
            acc = tl.dot(weighted, matrix, acc, input_precision="ieee")
    return acc, denom, peak


@triton.jit
def _summarize_kernel(
    k,  # [batch, kv_len, heads, dim]
    v,
    key_mean,  # [batch, heads, kv_blocks, dim], contiguous
    value_mean,
    count,  # [batch, kv_blocks] fp32
    slope,  # [batch, heads, programs, dim, dim] fp32, or None
    key_valid,  # [batch, kv_len] uint8, or None
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    heads,
    kv_len,
    live_len,  # keys in the blocks that count
    columns,
    per_program,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Summarises ``per_program`` consecutive blocks of one head."""
    program = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)
    tokens = tl.arange(0, BLOCK)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    if key_valid is not None:
        key_valid += batch * kv_len
    k_token = tl.cast(k_token, tl.int64)
    v_token = tl.cast(v_token, tl.int64)
    total = tl.zeros([DIM_PAD, DIM_PAD], dtype=tl.float32)  # unused, hence removed, without slope
    first = program * per_program
    for column in range(first, tl.minimum(first + per_program, columns)):
        start = column * BLOCK
        live = start + tokens < live_len
        if key_valid is not None:
            live = tl.load(key_valid + start + tokens, mask=live, other=0) != 0
        load_mask = live[:, None] & (dims < DIM)[None, :]
        keys = tl.load(
            k + start * k_token + (tokens[:, None] * k_token + dims[None, :]),
            mask=load_mask,
            other=0.0,
        )
        values = tl.load(
            v + start * v_token + (tokens[:, None] * v_token + dims[None, :]),
            mask=load_mask,
            other=0.0,
        )
        size = tl.sum(live.to(tl.float32), 0)
        divisor = tl.maximum(size, 1.0)
        mean = tl.sum(keys.to(tl.float32), 0) / divisor
        at = ((batch * heads + head) * columns + column) * DIM + dims
        tl.store(key_mean + at, mean.to(key_mean.dtype.element_ty), mask=dims < DIM)
        value = tl.sum(values.to(tl.float32), 0) / divisor
        tl.store(value_mean + at, value.to(value_mean.dtype.element_ty), mask=dims < DIM)
        if head == 0:
            tl.store(count + batch * columns + column, size)
        if slope is not None:
            # sum (k - kbar) v^T = sum k v^T - n kbar vbar^T: tiles go to the product as they come,
            # so that their loads can be pipelined.
            total = tl.dot(tl.trans(keys), values, total, input_precision="ieee")
            total -= (size * mean)[:, None] * value[None, :]
    if slope is not None:
        at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program) * DIM * DIM
        tl.store(
            slope + at + dims[:, None] * DIM + dims[None, :],
            total,
            mask=(dims < DIM)[:, None] & (dims < DIM)[None, :],
        )


@triton.jit
def _slope_kernel(
    partial,  # [batch, heads, programs, SIZE] fp32
    count,  # [batch, columns] fp32
    slope,  # [batch, heads, SIZE] fp32
    rounded,  # same in the keys' dtype, or None
    heads,
    programs,
    columns,
    SIZE: tl.constexpr,  # dim * dim
    PARTS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Mean over keys from partial sums: ``PLACES`` entries of one head's matrix."""
    plane = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    partial += plane * programs * SIZE
    count += plane // heads * columns
    total = tl.zeros([PLACES], dtype=tl.float32)
    for first in range(0, programs, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < programs)[:, None] & (place < SIZE)[None, :]
        at = part[:, None] * SIZE + place[None, :]
        total += tl.sum(tl.load(partial + at, mask=inside, other=0.0), 0)
    keys = tl.zeros([PLACES], dtype=tl.float32)
    for start in range(0, columns, PLACES):
        column = start + tl.arange(0, PLACES)
        keys += tl.load(count + column, mask=column < columns, other=0.0)
    total = total / tl.maximum(tl.sum(keys, 0), 1.0)
    tl.store(slope + plane * SIZE + place, total, mask=place < SIZE)
    if rounded is not None:
        at = rounded + plane * SIZE + place
        tl.store(at, total.to(rounded.dtype.element_ty), mask=place < SIZE)


class TritonSummarize(Impl):
    op, name, rank = "summarize", "triton", RANK

    def reasons(self, call: SummarizeCall) -> list[str]:
        return refusals(call.k, (call.block, call.block))

    def __call__(self, call: SummarizeCall) -> BlockSummary:
        k, v = last_contiguous(call.k), last_contiguous(call.v)
        batch, kv_len, heads, dim = k.shape
        columns = block_count(kv_len, call.block)
        # Blocks of one head lie side by side, as attention reads them.
        key_mean = k.new_empty((batch, heads, columns, dim))
        value_mean = torch.empty_like(key_mean)
        means = key_mean.transpose(1, 2), value_mean.transpose(1, 2)
        count = k.new_empty((batch, columns), dtype=torch.float32)
        if key_mean.numel() == 0:
            slope = key_mean.new_zeros(batch, heads, dim, dim, dtype=torch.float32)
            return BlockSummary(*means, count.zero_(), slope if call.first_order else None)
        plan = _plan(
            k.shape, k.stride(), v.stride(), k.element_size(),
            call.block, call.blocks, call.first_order,
        )  # fmt: skip
        programs = plan.programs
        partial = None
        if call.first_order:
            partial = k.new_empty((batch, heads, programs, dim, dim), dtype=torch.float32)
        flags = None
        if call.key_valid is not None:
            flags = call.key_valid.contiguous().view(torch.uint8)
        plan.summarize(
            (programs, batch * heads), (k, v, key_mean, value_mean, count, partial, flags)
        )
        if partial is None:
            return BlockSummary(*means, count)
        slope = k.new_empty((batch, heads, dim, dim), dtype=torch.float32)
        rounded = None if k.dtype == torch.float32 else torch.empty_like(slope, dtype=k.dtype)
        grid = ceil_div(dim * dim, _PLACES), batch * heads
        plan.slope(grid, (partial, count, slope, rounded))
        return BlockSummary(*means, count, slope, rounded)


class _Plan(NamedTuple):
    """How summaries of tensors of one shape are made.

    Attributes:
        summarize: Launch of the first kernel.
        slope: Launch of the second one, which adds up what its programs found.
        programs: Programs of the first for each head.
    """

    summarize: Launch
    slope: Launch
    programs: int


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    bytes_each: int,
    block: int,
    blocks: int,
    first_order: bool,
) -> _Plan:
    batch, kv_len, heads, dim = shape
    columns, pad = block_count(kv_len, block), padded_dim(dim)
    # Without the slope every block is a program of its own.
    wanted = max(1, _SLOPE_PROGRAMS // (batch * heads)) if first_order else columns
    per_program = ceil_div(columns, wanted)
    programs = ceil_div(columns, per_program)
    # Depth of the pipeline of loads: 96 KiB of shared memory, which all cards have.
    stages = max(1, min(3, (96 << 10) // (2 * block * pad * bytes_each))) if first_order else 1
    summarize = Launch(
        _summarize_kernel,
        (*k_strides[:3], *v_strides[:3], heads, kv_len, min(kv_len, blocks * block), columns,
         per_program),
        DIM=dim, DIM_PAD=pad, BLOCK=block, num_warps=8 if pad > 64 else 4, num_stages=stages,
    )  # fmt: skip
    slope = Launch(
        _slope_kernel, (heads, programs, columns),
        SIZE=dim * dim, PARTS=8, PLACES=_PLACES, num_warps=4,
    )  # fmt: skip
    return _Plan(summarize, slope, programs)
