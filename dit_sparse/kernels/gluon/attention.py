"""Block-sparse attention for Hopper in Gluon, Triton's lower level.

One persistent program a multiprocessor, in three groups of warps. A single warp loads: queries, and
then the listed key blocks through TMA into two rings, one for keys and one for values. Two groups
of four warps take 64 queries each; while the tensor cores multiply the weights of one tile with its
values, the group computes the softmax of the next. Tiles of queries are drawn from a counter, those
with text first because they are the longest.

A tile of keys is 128 wide whatever the mask's blocks: with blocks of 64 two of the list share one.
The summaries of skipped blocks (:mod:`dit_sparse.kernels.summary`) are tiles like others, whose
scores get ``log2(count)`` or, for kept blocks, ``-inf``.

Source: the pipeline is FlashAttention-3's (arXiv 2407.08608, section 3), without its explicit
ping-pong between the two groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_sparse.kernels.gluon.boxes import (
    box_reasons,
    head_boxes,
    load_box,
    multiprocessors,
    store_box,
)
from dit_sparse.kernels.gluon.tiles import (
    EDGE,
    TILE_K,
    TILE_Q,
    clear_values,
    entry,
    keep_columns,
    locate,
    next_tile,
)
from dit_sparse.kernels.ops import Attended, AttentionCall
from dit_sparse.kernels.probe import probe_reasons
from dit_sparse.kernels.triton_common import LOG2_E, as_float, last_contiguous
from dit_sparse.kernels.triton_launch import Boxes, BoxShape, Launch
from dit_sparse.kernels.triton_mask import list_steps, lists_of, words_of
from dit_sparse.kernels.triton_padding import validity


@gluon.jit
def _load_tiles(
    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, slope_desc,
    q_smem, k_smem, v_smem, tile_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    counter, counts, indices, mask_batch, mask_head, list_len, q_tiles, heads, total, edge,
    total_edge, columns,
    DIM: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, SUMMARY: gl.constexpr, SLOPE: gl.constexpr,
):  # fmt: skip
    K_BYTES: gl.constexpr = TILE_K * DIM * 2
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < total:
        slot = turn & 1
        mbarrier.wait(tile_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        tile_smem.index(slot).store(gl.full([1], tile, gl.int32, ONE))
        mbarrier.arrive(tile_full.index(slot), count=1)
        row, head, batch = locate(tile, total_edge, edge, q_tiles, heads)
        mask_row = batch.to(gl.int64) * mask_batch + head * mask_head + row
        count = gl.load(counts + mask_row)
        listed = indices + mask_row * list_len
        mbarrier.wait(q_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), TILE_Q * DIM * 2)
        for half in gl.static_range(2):
            load_box(
                q_desc, [batch, head, row * TILE_Q + half * (TILE_Q // 2), 0],
                q_full.index(slot), q_smem.index(2 * slot + half),
            )  # fmt: skip
        tiles = (count + SPLIT - 1) // SPLIT
        steps = tiles
        if SUMMARY:
            steps = tiles + (columns + TILE_K - 1) // TILE_K
        following = total
        # Values come one step after their keys, as they are wanted.
        for i in range(0, steps + 1):
            if i == gl.minimum(steps, 1):
                # Drawn while loads are under way, which hide that it takes a microsecond.
                following = gl.atomic_add(counter, 1) + gl.num_programs(0)
            if i < steps:
                stage = n % STAGES
                mbarrier.wait(k_empty.index(stage), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(stage), K_BYTES)
                if i < tiles:
                    for part in gl.static_range(SPLIT):
                        block = gl.load(listed + entry(i, part, count, SPLIT))
                        load_box(
                            k_desc, [batch, head, block * BLOCK_K, 0], k_full.index(stage),
                            k_smem.index(stage).slice(part * BLOCK_K, BLOCK_K, dim=2),
                        )  # fmt: skip
                else:
                    if SUMMARY:
                        load_box(
                            mean_k_desc, [batch, head, (i - tiles) * TILE_K, 0],
                            k_full.index(stage), k_smem.index(stage),
                        )  # fmt: skip
            if i > 0:
                before = n - 1
                stage = before % STAGES
                mbarrier.wait(v_empty.index(stage), ((before // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(stage), K_BYTES)
                if i <= tiles:
                    for part in gl.static_range(SPLIT):
                        block = gl.load(listed + entry(i - 1, part, count, SPLIT))
                        load_box(
                            v_desc, [batch, head, block * BLOCK_K, 0], v_full.index(stage),
                            v_smem.index(stage).slice(part * BLOCK_K, BLOCK_K, dim=2),
                        )  # fmt: skip
                else:
                    if SUMMARY:
                        load_box(
                            mean_v_desc, [batch, head, (i - 1 - tiles) * TILE_K, 0],
                            v_full.index(stage), v_smem.index(stage),
                        )  # fmt: skip
            n += (i < steps).to(gl.int32)
        if SLOPE:
            # The matrix takes the place of one more tile of values.
            stage = n % STAGES
            mbarrier.wait(k_empty.index(stage), ((n // STAGES) & 1) ^ 1)
            mbarrier.wait(v_empty.index(stage), ((n // STAGES) & 1) ^ 1)
            mbarrier.arrive(k_full.index(stage), count=1)
            mbarrier.expect(v_full.index(stage), DIM * DIM * 2)
            load_box(
                slope_desc, [batch, head, 0, 0], v_full.index(stage),
                v_smem.index(stage).slice(0, DIM, dim=2),
            )  # fmt: skip
            n += 1
        turn += 1
        tile = following
    slot = turn & 1
    mbarrier.wait(tile_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    tile_smem.index(slot).store(gl.full([1], total, gl.int32, ONE))
    mbarrier.arrive(tile_full.index(slot), count=1)


@gluon.jit
def _count(tile, total, counts, mask_batch, mask_head, total_edge, edge, q_tiles, heads):
    """Blocks that are listed for a tile; 0 behind the last one."""
    row, head, batch = locate(tile, total_edge, edge, q_tiles, heads)
    at = batch.to(gl.int64) * mask_batch + head * mask_head + row
    return gl.load(counts + at, mask=tile < total, other=0)


@gluon.jit
def _has_steps(tile, total, count, columns, SUMMARY: gl.constexpr):
    """Whether a tile has any keys."""
    some = count > 0
    if SUMMARY:
        some = some | (columns > 0)
    return (some & (tile < total)).to(gl.int32)


@gluon.jit
def _bias_columns(i, key_count, bits, columns, LAYOUT: gl.constexpr, TILE_K: gl.constexpr):
    """What is added to the scores of the ``i``-th tile of means: ``[TILE_K]`` fp32, base 2."""
    # One column a thread, then shared: in LAYOUT every thread would load a quarter of them.
    SPREAD: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = i * TILE_K + gl.arange(0, TILE_K, SPREAD)
    inside = column < columns
    word = gl.load(bits + column // 32, mask=inside, other=0)
    bias = gl.log2(gl.load(key_count + column, mask=inside, other=0.0))
    bias = gl.where(((word >> (column % 32)) & 1) == 0, bias, float("-inf"))
    return gl.convert_layout(bias, LAYOUT)


@gluon.jit
def _step(
    queries, k_smem, v_smem, k_full, k_empty, v_full, v_empty, p, acc, peak, denom, tail, n, more,
    bias, keep, dirty, i, listed, count, key_valid, kv_len, scale_log2,
    S: gl.constexpr, P: gl.constexpr, OUT_ROW: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    TILE_K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of the next tile while the values of the one before are multiplied."""
    stage = n % STAGES
    keys = k_smem.index(stage).reshape([TILE_K, DIM]).permute((1, 0))
    nothing = gl.zeros([ROWS, TILE_K], gl.float32, S)
    s_token = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
    before = (n - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((n - 1) // STAGES) & 1)
    values = v_smem.index(before).reshape([TILE_K, DIM])
    if key_valid is not None:
        if dirty:
            clear_values(values, i - 1, listed, count, key_valid, kv_len, DIM, TILE_K, BLOCK_K)
    o_token = warpgroup_mma(p, values, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(s_token,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if bias is not None:
        scores = scores * scale_log2 + bias[None, :]
        new_peak = gl.maximum(peak, gl.max(scores, 1))
        shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = gl.exp2(scores - shift[:, None])
    else:
        if keep is not None:
            scores = gl.where(keep[None, :], scores, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
        shift = new_peak
        if keep is not None:
            shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = gl.exp2(scores * scale_log2 - shift[:, None])
    decay = gl.exp2(peak - shift)
    added = gl.sum(weights, 1)
    denom = denom * decay + added
    if bias is not None:
        tail = tail * decay + added
    n += 1
    # Also keeps the compiler from moving the exponentials behind the wait that follows.
    mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=more)
    acc = warpgroup_mma_wait(0, deps=(o_token,))
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None]
    p = gl.convert_layout(weights.to(v_smem.dtype), P)
    return p, acc, new_peak, denom, tail, n


@gluon.jit
def _attend_tiles(
    WHICH: gl.constexpr, q_smem, k_smem, v_smem, tile_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty, out_desc,
    lse, kept_lse, counts, indices, key_valid, valid_prefix, key_count, bits,
    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge, columns,
    q_len, kv_len, scale, scale_log2,
    DIM: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, SUMMARY: gl.constexpr, SLOPE: gl.constexpr,
):  # fmt: skip
    LN_2: gl.constexpr = 0.6931471805599453
    NEG_INF: gl.constexpr = float("-inf")
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    ROWS: gl.constexpr = TILE_Q // 2
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    S_COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    VALID: gl.constexpr = key_valid is not None
    MASKED: gl.constexpr = RAGGED or SPLIT > 1 or VALID
    dtype: gl.constexpr = q_smem.dtype
    nothing = gl.zeros([ROWS, TILE_K], gl.float32, S)
    n = 0
    turn = 0
    tile = next_tile(tile_smem, tile_full, tile_empty, turn)
    count = _count(tile, total, counts, mask_batch, mask_head, total_edge, edge, q_tiles, heads)
    has = _has_steps(tile, total, count, columns, SUMMARY)
    mbarrier.wait(q_full.index(0), 0, pred=tile < total)
    mbarrier.wait(k_full.index(0), 0, pred=has > 0)
    queries = q_smem.index(WHICH).reshape([ROWS, DIM])
    keys = k_smem.index(0).reshape([TILE_K, DIM]).permute((1, 0))
    s_token = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(s_token,))
    mbarrier.arrive(k_empty.index(0), count=1, pred=has > 0)
    while tile < total:
        row, head, batch = locate(tile, total_edge, edge, q_tiles, heads)
        plane = batch.to(gl.int64) * heads + head
        mask_row = batch.to(gl.int64) * mask_batch + head * mask_head + row
        listed = indices + mask_row * list_len
        tiles = (count + SPLIT - 1) // SPLIT
        steps = tiles
        flagged = 0
        flags = key_valid
        if VALID:
            # Blocks past the first key that does not exist; the list ascends.
            flags = key_valid + batch.to(gl.int64) * kv_len
            inside = gl.load(valid_prefix + batch) // BLOCK_K
            LIST: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            unsafe = gl.full([128], 0, gl.int32, LIST)
            for start in range(0, count, 128):
                at = start + gl.arange(0, 128, LIST)
                block = gl.load(listed + at, mask=at < count, other=0)
                unsafe += ((block >= inside) & (at < count)).to(gl.int32)
            flagged = (gl.sum(unsafe, 0) + count % SPLIT + SPLIT - 1) // SPLIT
        if SUMMARY:
            steps = tiles + (columns + TILE_K - 1) // TILE_K
            row_count = key_count + batch.to(gl.int64) * columns
            row_bits = bits + mask_row * ((columns + 31) // 32)
        slot = turn & 1
        queries = q_smem.index(2 * slot + WHICH).reshape([ROWS, DIM])
        first = row * TILE_Q + WHICH * ROWS
        s_rows = first + gl.arange(0, ROWS, S_ROW)
        acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
        tail = gl.full([ROWS], 0.0, gl.float32, S_ROW)
        # The scores of the first tile, computed behind the last row's values.
        if tiles > 0:
            scores = scores * scale_log2
            if MASKED:
                keep = keep_columns(
                    0, 0, TILE_K, listed, count, flags, kv_len, S_COLUMN, TILE_K, BLOCK_K
                )
                scores = gl.where(keep[None, :], scores, NEG_INF)
        else:
            if SUMMARY:
                bias = _bias_columns(0, row_count, row_bits, columns, S_COLUMN, TILE_K)
                scores = scores * scale_log2 + bias[None, :]
            else:
                scores = gl.full([ROWS, TILE_K], NEG_INF, gl.float32, S)
        peak = gl.max(scores, 1)
        shift = gl.where(peak == NEG_INF, 0.0, peak)
        weights = gl.exp2(scores - shift[:, None])
        denom = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(dtype), P)
        n += (steps > 0).to(gl.int32)
        # The row before has left shared memory: its place takes other queries.
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(1 - slot), count=1, pred=turn > 0)
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=steps > 1)
        if VALID:
            for i in range(1, gl.minimum(flagged + 1, tiles)):
                keep = keep_columns(
                    i, 0, TILE_K, listed, count, flags, kv_len, S_COLUMN, TILE_K, BLOCK_K
                )
                p, acc, peak, denom, tail, n = _step(
                    queries, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                    p, acc, peak, denom, tail, n, i + 1 < steps,
                    None, keep, i - 1 < flagged, i, listed, count, flags, kv_len, scale_log2,
                    S, P, OUT_ROW, ROWS, DIM, TILE_K, BLOCK_K, STAGES,
                )  # fmt: skip
        for i in range(gl.maximum(gl.minimum(flagged + 1, tiles), 1), tiles):
            p, acc, peak, denom, tail, n = _step(
                queries, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                p, acc, peak, denom, tail, n, i + 1 < steps,
                None, None, False, i, listed, count, None, kv_len, scale_log2,
                S, P, OUT_ROW, ROWS, DIM, TILE_K, BLOCK_K, STAGES,
            )  # fmt: skip
        if SUMMARY:
            kept = gl.where(denom == 0.0, NEG_INF, (peak + gl.log2(denom)) * LN_2)
            if tiles == 0:
                tail = denom
                kept = gl.full([ROWS], NEG_INF, gl.float32, S_ROW)
            gl.store(kept_lse + plane * q_len + s_rows, kept, mask=s_rows < q_len)
            for i in range(gl.maximum(tiles, 1), steps):
                bias = _bias_columns(i - tiles, row_count, row_bits, columns, S_COLUMN, TILE_K)
                p, acc, peak, denom, tail, n = _step(
                    queries, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                    p, acc, peak, denom, tail, n, i + 1 < steps,
                    bias, None, (i - 1 < flagged) & (i <= tiles), i, listed, count, flags,
                    kv_len, scale_log2,
                    S, P, OUT_ROW, ROWS, DIM, TILE_K, BLOCK_K, STAGES,
                )  # fmt: skip
        # The last values of this row and the first scores of the next one.
        following = next_tile(tile_smem, tile_full, tile_empty, turn + 1)
        next_count = _count(
            following, total, counts, mask_batch, mask_head, total_edge, edge, q_tiles, heads
        )
        next_has = _has_steps(following, total, next_count, columns, SUMMARY)
        last = gl.maximum(n - 1, 0)
        before = last % STAGES
        mbarrier.wait(v_full.index(before), (last // STAGES) & 1, pred=steps > 0)
        values = v_smem.index(before).reshape([TILE_K, DIM])
        if VALID:
            if (steps == tiles) & (steps > 0) & (steps - 1 < flagged):
                clear_values(values, steps - 1, listed, count, flags, kv_len, DIM, TILE_K, BLOCK_K)
        if SLOPE:
            stage = n % STAGES
            P_ROW: gl.constexpr = gl.SliceLayout(1, P)
            factor = gl.convert_layout(tail * scale, P_ROW)
            weighted = (queries.load(P).to(gl.float32) * factor[:, None]).to(dtype)
            mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
            mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
        after = n
        if SLOPE:
            after = n + 1
        next_slot = (turn + 1) & 1
        mbarrier.wait(q_full.index(next_slot), ((turn + 1) >> 1) & 1, pred=following < total)
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=next_has > 0)
        o_token = warpgroup_mma(p, values, acc, is_async=True)
        if SLOPE:
            # acc is not normalised yet: the share of the skipped blocks is tail / denom.
            matrix = v_smem.index(stage).reshape([TILE_K, DIM]).slice(0, DIM, dim=0)
            o_token = warpgroup_mma(weighted, matrix, o_token, is_async=True)
        next_queries = q_smem.index(2 * next_slot + WHICH).reshape([ROWS, DIM])
        keys = k_smem.index(after % STAGES).reshape([TILE_K, DIM]).permute((1, 0))
        s_token = warpgroup_mma(next_queries, keys, nothing, use_acc=False, is_async=True)
        empty = denom == 0.0
        safe = gl.where(empty, 1.0, denom)
        natural = gl.where(empty, NEG_INF, (peak + gl.log2(safe)) * LN_2)
        gl.store(lse + plane * q_len + s_rows, natural, mask=s_rows < q_len)
        acc = warpgroup_mma_wait(1, deps=(o_token,))
        mbarrier.arrive(v_empty.index(before), count=1, pred=steps > 0)
        if SLOPE:
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.arrive(v_empty.index(stage), count=1)
        # Rows that attend to nothing multiplied whatever lay in shared memory.
        factor = gl.convert_layout(gl.where(empty, 0.0, 1.0 / safe), OUT_ROW)[:, None]
        acc = gl.where(factor == 0.0, 0.0, acc * factor)
        # The queries are done with: their place holds the result until it has left.
        result = q_smem.index(2 * slot + WHICH)
        result.reshape([ROWS, DIM]).store(acc.to(dtype))
        fence_async_shared()
        store_box(out_desc, [batch, head, first, 0], result)
        scores = warpgroup_mma_wait(0, deps=(s_token,))
        mbarrier.arrive(k_empty.index(after % STAGES), count=1, pred=next_has > 0)
        n = after
        turn += 1
        tile = following
        count = next_count
    tma.store_wait(0)


@gluon.jit
def _attention_kernel(
    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, slope_desc, out_desc, lse, kept_lse,
    counter, counts, indices, key_valid, valid_prefix, key_count, bits,
    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge, columns,
    q_len, kv_len, scale, scale_log2,
    DIM: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, SUMMARY: gl.constexpr, SLOPE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [4, 1, 1, TILE_Q // 2, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, DIM], v_desc.layout)
    tile_smem = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    for stage in gl.static_range(2):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=2)
        mbarrier.init(tile_full.index(stage), count=1)
        mbarrier.init(tile_empty.index(stage), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (
                _attend_tiles,
                (
                    0, q_smem, k_smem, v_smem, tile_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
                    out_desc, lse, kept_lse, counts, indices, key_valid, valid_prefix, key_count,
                    bits,
                    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge,
                    columns, q_len, kv_len, scale, scale_log2,
                    DIM, TILE_Q, TILE_K, BLOCK_K, STAGES, RAGGED, SUMMARY, SLOPE,
                ),
            ),
            (
                _attend_tiles,
                (
                    1, q_smem, k_smem, v_smem, tile_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
                    out_desc, lse, kept_lse, counts, indices, key_valid, valid_prefix, key_count,
                    bits,
                    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge,
                    columns, q_len, kv_len, scale, scale_log2,
                    DIM, TILE_Q, TILE_K, BLOCK_K, STAGES, RAGGED, SUMMARY, SLOPE,
                ),
            ),
            (
                _load_tiles,
                (
                    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, slope_desc,
                    q_smem, k_smem, v_smem, tile_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
                    counter, counts, indices, mask_batch, mask_head, list_len, q_tiles, heads,
                    total, edge, total_edge, columns,
                    DIM, TILE_Q, TILE_K, BLOCK_K, STAGES, SUMMARY, SLOPE,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def reasons(call: AttentionCall) -> list[str]:
    """Why this kernel cannot compute ``call`` on Hopper; empty if it can."""
    found = []
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"takes bfloat16 and float16, got {call.q.dtype}")
    if call.q.shape[-1] not in (64, 128):
        found.append(f"takes head dims 64 and 128, got {call.q.shape[-1]}")
    if call.mask is None or call.v is None:
        found.append("takes calls with a mask and values")
    elif call.mask.block not in ((128, 64), (128, 128)):
        found.append(f"takes query blocks of 128, got blocks of {call.mask.block}")
    operands = {"q": call.q, "k": call.k, "v": call.v}
    if call.summary is not None:
        operands["key_mean"] = call.summary.key_mean
        operands["value_mean"] = call.summary.value_mean
        operands["slope"] = call.summary.rounded
    for name, tensor in operands.items():
        if tensor is not None:
            found += box_reasons(name, tensor)
    # Gluon changes with triton: what a version makes of this file is tested before it is used.
    return found or probe_reasons("triton's kernel for Hopper", launch, call)


def launch(call: AttentionCall) -> Attended:
    """Runs the kernel on a call for which ``reasons`` is empty.

    Returns:
        ``out [batch, q_len, heads, dim]``, ``lse [batch, heads, q_len]`` fp32 and, with a summary,
        ``lse_kept`` as ``lse``.
    """
    assert call.v is not None and call.mask is not None
    q, k, v = last_contiguous(call.q), last_contiguous(call.k), last_contiguous(call.v)
    plan = call.keep("hopper", lambda call: _plan(call, q, k, v))
    batch, q_len, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    counter = q.new_empty(1, dtype=torch.int32)
    counts, indices = lists_of(call.mask, counter)
    flags, prefix = validity(call.key_valid)
    kept_lse = key_count = bits = mean_k = mean_v = slope = None
    summary = call.summary
    if summary is not None:
        kept_lse = torch.empty_like(lse)
        key_count = as_float(summary.count)
        bits = words_of(call.mask)
        mean_k = Boxes(summary.key_mean, plan.means[0])
        mean_v = Boxes(summary.value_mean, plan.means[1])
        matrix = summary.slope_as(q.dtype)
        if matrix is not None and plan.slope is not None:
            slope = Boxes(matrix, plan.slope)
    plan.launch(
        plan.grid,
        (Boxes(q, plan.operands[0]), Boxes(k, plan.operands[1]), Boxes(v, plan.operands[2]),
         mean_k, mean_v, slope, Boxes(out, plan.out), lse, kept_lse,
         counter, counts, indices, flags, prefix, key_count, bits),
    )  # fmt: skip
    return Attended(out, lse, kept_lse)


class _Plan(NamedTuple):
    """How the kernel is launched, which follows from the signature of the call.

    Attributes:
        launch: The kernel with all arguments but tensors.
        grid: Programs.
        operands: How TMA reads queries, keys and values.
        out: How it writes the result.
        means: How it reads means of keys and of values; empty without a summary.
        slope: How it reads the slope; None without one.
    """

    launch: Launch
    grid: tuple[int]
    operands: tuple[BoxShape, ...]
    out: BoxShape
    means: tuple[BoxShape, ...]
    slope: BoxShape | None


def _plan(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> _Plan:
    """How ``call`` is launched, given its operands with contiguous last dimensions."""
    assert call.mask is not None
    batch, q_len, heads, dim = q.shape
    _, _, mask_rows, columns = call.mask.shape
    block, kv_len, summary = call.mask.block[1], k.shape[1], call.summary
    means: tuple[BoxShape, ...] = ()
    slope = None
    if summary is not None:
        means = tuple(head_boxes(x, TILE_K) for x in (summary.key_mean, summary.value_mean))
        matrix = summary.slope_as(q.dtype)
        if matrix is not None:
            slope = head_boxes(matrix.transpose(1, 2), dim)
    total = mask_rows * batch * heads
    edge = min(EDGE, mask_rows // 2)
    launch = Launch(
        _attention_kernel,
        (*list_steps(call.mask), mask_rows, heads, total, edge, 2 * edge * batch * heads,
         columns, q_len, kv_len, call.scale, call.scale * LOG2_E),
        DIM=dim, TILE_Q=TILE_Q, TILE_K=TILE_K, BLOCK_K=block,
        STAGES=2 if dim == 128 else 4, RAGGED=kv_len % block != 0,
        SUMMARY=summary is not None, SLOPE=slope is not None,
        num_warps=4,
    )  # fmt: skip
    operands = head_boxes(q, TILE_Q // 2), head_boxes(k, block), head_boxes(v, block)
    # As the result is laid out: contiguous.
    out = head_boxes(torch.empty(q.shape, dtype=q.dtype, device="meta"), TILE_Q // 2)
    grid = (min(total, multiprocessors(q.device)),)
    return _Plan(launch, grid, operands, out, means, slope)
