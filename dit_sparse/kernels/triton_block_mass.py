"""Attention mass of every block in Triton, without an ``N x N`` matrix in memory.

One program holds one tile of queries and walks all key blocks, writing one number for each.

Source: AdaSpa (arXiv 2502.21079), algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.ops import BlockMassCall, Impl
from dit_sparse.kernels.triton_common import (
    LOG2_E,
    MASK_BLOCKS,
    RANK,
    as_float,
    capability,
    ceil_div,
    gluon_module,
    gluon_reasons,
    last_contiguous,
    padded_dim,
    refusals,
)
from dit_sparse.kernels.triton_launch import launch_kernel
from dit_sparse.kernels.triton_padding import validity

Path = Literal["pointer", "hopper"]
# Rows of a query block; fewer than masks have where a search looks at some of them only.
QUERY_BLOCKS = (16, 32, *MASK_BLOCKS)


@triton.jit
def _sum_blocks(
    mass,
    rows_left,
    columns,
    q,
    shift,
    k,
    key_valid,
    first,
    last,
    kv_len,
    k_stride,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Stores the mass of the key blocks ``first..last`` to ``rows_left`` rows of ``mass``."""
    segment = tl.arange(0, SEGMENTS)
    tokens = tl.arange(0, TILE_K)
    dims = tl.arange(0, DIM_PAD)
    for block in range(first, last):
        total = 0.0 if SEGMENTS == 1 else tl.zeros([SEGMENTS], tl.float32)
        for part in range(BLOCK_K // TILE_K):
            start = block * BLOCK_K + part * TILE_K
            k_at = k + start * k_stride + (tokens[:, None] * k_stride + dims[None, :])
            if MASKED:
                keep = start + tokens < kv_len  # [TILE_K]
                if key_valid is not None:
                    keep = tl.load(key_valid + start + tokens, mask=keep, other=0) != 0
                keys = tl.load(k_at, mask=keep[:, None] & (dims < DIM)[None, :], other=0.0)
            elif DIM != DIM_PAD:
                keys = tl.load(k_at, mask=(dims < DIM)[None, :], other=0.0)
            else:
                keys = tl.load(k_at)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee")  # [TILE_Q, TILE_K]
            weights = tl.exp2(scores * scale_log2 - shift[:, None])
            if MASKED:
                weights = tl.where(keep[None, :], weights, 0.0)
            if SEGMENTS == 1:
                total += tl.sum(tl.sum(weights, 1), 0)
            else:
                size: tl.constexpr = weights.shape[0] // SEGMENTS
                total += tl.sum(tl.reshape(tl.sum(weights, 1), [SEGMENTS, size]), 1)
        if SEGMENTS == 1:
            tl.store(mass + block, total)
        else:
            tl.store(mass + segment * columns + block, total, mask=segment < rows_left)


@triton.jit
def _block_mass_fwd_kernel(
    q,  # [batch, q_len, heads, dim]
    k,  # [batch, kv_len, heads, dim]
    lse,  # [batch, heads, q_len] fp32, contiguous
    mass,  # [batch, heads, rows, kv_blocks] fp32, contiguous
    key_valid,  # [batch, kv_len] uint8, or None
    valid_prefix,  # [batch] int32, or None
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    heads,
    rows_total,  # of mass: query blocks, or tiles where these are smaller
    q_len,
    kv_len,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENTS: tl.constexpr,  # query blocks of a tile
    NEEDS_MASK: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    tile = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)

    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_PAD)
    live = rows < q_len
    q += batch64 * q_batch + head64 * q_head
    at_q = live[:, None] & (dims < DIM)[None, :]
    queries = tl.load(q + rows.to(tl.int64)[:, None] * q_token + dims[None, :], mask=at_q, other=0)
    # Empty rows and rows past the end contribute exp2(-inf) = 0.
    shift = tl.load(lse + (batch64 * heads + head) * q_len + rows, mask=live, other=float("inf"))
    shift = tl.where(shift == float("-inf"), float("inf"), shift * LOG2_E)

    columns = tl.cdiv(kv_len, BLOCK_K)
    inside = kv_len // BLOCK_K
    if valid_prefix is not None:
        inside = tl.load(valid_prefix + batch) // BLOCK_K
        key_valid += batch64 * kv_len
    k += batch64 * k_batch + head64 * k_head
    # 64-bit, so that token * stride cannot overflow.
    k_stride = tl.cast(k_token, tl.int64)
    row = tile * SEGMENTS
    rows_left = rows_total - row
    mass += (tl.program_id(1).to(tl.int64) * rows_total + row) * columns
    _sum_blocks(
        mass, rows_left, columns, queries, shift, k, key_valid, 0, inside, kv_len, k_stride,
        scale_log2, DIM, DIM_PAD, TILE_K, BLOCK_K, False, SEGMENTS,
    )  # fmt: skip
    if NEEDS_MASK:
        _sum_blocks(
            mass, rows_left, columns, queries, shift, k, key_valid, inside, columns, kv_len,
            k_stride, scale_log2, DIM, DIM_PAD, TILE_K, BLOCK_K, True, SEGMENTS,
        )  # fmt: skip


def hopper_reasons(call: BlockMassCall) -> list[str]:
    """Why ``call`` cannot be computed by the Gluon kernel for Hopper; empty if it can."""
    return gluon_reasons("block_mass", call)


def launch(call: BlockMassCall, path: Path = "pointer") -> Tensor:
    """Runs the kernel.

    Args:
        call: One for which ``TritonBlockMass.reasons`` is empty.
        path: ``"pointer"``, or ``"hopper"`` for :mod:`dit_sparse.kernels.gluon.block_mass`, which
            requires ``hopper_reasons(call)`` empty.

    Returns:
        ``[batch, heads, q_blocks, kv_blocks]`` fp32.
    """
    if path == "hopper":
        return gluon_module("block_mass").launch(call)
    q, k = last_contiguous(call.q), last_contiguous(call.k)
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    # In 16 bit one tile is one block, at dim 256 half of one to fit the shared memory of
    # consumer cards, and of query blocks below 64 as many as make 64 rows: keys then serve more
    # queries. fp32 products run on the FMA units with operands in registers: larger tiles spill.
    single, wide = q.dtype == torch.float32, padded_dim(dim) == 256
    limit = (16 if wide else 32) if single else (64 if wide else 128)
    fewest = 16 if single else 64
    tile_q, tile_k = min(limit, max(fewest, call.block[0])), min(limit, call.block[1])
    rows, columns = ceil_div(q_len, call.block[0]), ceil_div(kv_len, call.block[1])
    parts, segments = max(1, call.block[0] // tile_q), max(1, tile_q // call.block[0])
    # Loads of part of a tile's columns take registers for their masks; Hopper has enough.
    partial = capability(q)[0] != 9 and padded_dim(dim) != dim
    flags, prefix = validity(call.key_valid)
    mass = q.new_empty((batch, heads, rows * parts, columns), dtype=torch.float32)
    if mass.numel() == 0:
        return mass.view(batch, heads, rows, parts, columns).sum(-2)
    launch_kernel(
        _block_mass_fwd_kernel, (ceil_div(rows * parts, segments), batch * heads),
        (q, k, as_float(call.lse), mass, flags, prefix),
        (*q.stride()[:3], *k.stride()[:3], heads, rows * parts, q_len, kv_len,
         call.scale * LOG2_E),
        DIM=dim, DIM_PAD=padded_dim(dim), TILE_Q=tile_q, TILE_K=tile_k,
        BLOCK_K=call.block[1], SEGMENTS=segments,
        NEEDS_MASK=flags is not None or kv_len % call.block[1] != 0,
        # 8 warps keep the 128 x 128 fp32 tile of scores at 64 registers a thread.
        num_warps=8 if single or partial or tile_q * tile_k > 64 * 128 else 4,
        num_stages=1 if single else 2,
    )  # fmt: skip
    return mass if parts == 1 else mass.view(batch, heads, rows, parts, columns).sum(-2)


class TritonBlockMass(Impl):
    op, name, rank = "block_mass", "triton", RANK

    def reasons(self, call: BlockMassCall) -> list[str]:
        found = refusals(call.q, None)
        rows, columns = call.block
        if rows not in QUERY_BLOCKS or columns not in MASK_BLOCKS:
            found.append(
                f"query blocks must be one of {QUERY_BLOCKS} and key blocks one of {MASK_BLOCKS}, "
                f"got {call.block}"
            )
        return found

    def __call__(self, call: BlockMassCall) -> Tensor:
        return launch(call, "pointer" if hopper_reasons(call) else "hopper")
