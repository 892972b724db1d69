"""Block-sparse attention in 8 bits for Hopper, in Gluon.

The pipeline is that of :mod:`dit_sparse.kernels.gluon.attention`: one warp loads, two groups of
four warps take 64 queries each. Queries and keys are e4m3, whose products take half the time. The
scale of each key block comes through shared memory with its tile and is a factor of the softmax's
scale, so that it costs no instruction a score.

With values in e4m3 too, the weights become the left operand of the second product where they lie.
An accumulator holds columns 2t, 2t + 1 of every eight in thread t of four; an 8-bit operand wants
4t .. 4t + 3 of every sixteen. Instead of exchanging weights between threads, the values are stored
in the order in which threads hold the weights (``fragments`` of
:func:`~dit_sparse.kernels.triton_quantize.quantize`). Products of 8 bits are accumulated with 14
bits only, so a tile's sum is added to the row's in fp32. That takes a second accumulator, hence the
registers of scores under way: there a tile's scores are queued behind the product of the values of
the one before, and the softmax waits for both.

Source: FlashAttention-3 (arXiv 2407.08608), section 3.3; sums in two levels: SageAttention2
(arXiv 2411.10958).
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_sparse.kernels.gluon.boxes import (
    box_reasons,
    box_shape,
    head_boxes,
    load_box,
    multiprocessors,
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
from dit_sparse.kernels.triton_common import LOG2_E, last_contiguous
from dit_sparse.kernels.triton_launch import Boxes, launch_kernel
from dit_sparse.kernels.triton_mask import list_steps, lists_of
from dit_sparse.kernels.triton_padding import validity
from dit_sparse.kernels.triton_quantize import Quantized, quantize


@gluon.jit
def _load_tiles(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, scale_smem, tile_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    counter, counts, indices, k_scale, mask_batch, mask_head, list_len, q_tiles, heads, total,
    edge, total_edge, columns,
    DIM: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, VALUES_8: gl.constexpr,
):  # fmt: skip
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    V_BYTES: gl.constexpr = TILE_K * DIM * (1 if VALUES_8 else 2)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    # One thread stores the scales of a tile and then tells that they are there.
    PARTS: gl.constexpr = gl.BlockedLayout([SPLIT], [32], [1], [0])
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
        scales = k_scale + (batch.to(gl.int64) * heads + head) * columns
        mbarrier.wait(q_empty.index(slot), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), TILE_Q * DIM)
        for half in gl.static_range(2):
            load_box(
                q_desc, [batch, head, row * TILE_Q + half * (TILE_Q // 2), 0],
                q_full.index(slot), q_smem.index(2 * slot + half),
            )  # fmt: skip
        steps = (count + SPLIT - 1) // SPLIT
        following = total
        # Values come one step after their keys, as they are wanted.
        for i in range(0, steps + 1):
            if i == gl.minimum(steps, 1):
                # Drawn while loads are under way, which hide that it takes a microsecond.
                following = gl.atomic_add(counter, 1) + gl.num_programs(0)
            if i < steps:
                stage = n % STAGES
                part_of = gl.arange(0, SPLIT, PARTS)
                factor = gl.load(scales + gl.load(listed + entry(i, part_of, count, SPLIT)))
                mbarrier.wait(k_empty.index(stage), ((n // STAGES) & 1) ^ 1)
                scale_smem.index(stage).store(factor)
                mbarrier.expect(k_full.index(stage), TILE_K * DIM)
                for part in gl.static_range(SPLIT):
                    block = gl.load(listed + entry(i, part, count, SPLIT))
                    load_box(
                        k_desc, [batch, head, block * BLOCK_K, 0], k_full.index(stage),
                        k_smem.index(stage).slice(part * BLOCK_K, BLOCK_K, dim=2),
                    )  # fmt: skip
            if i > 0:
                before = n - 1
                stage = before % STAGES
                mbarrier.wait(v_empty.index(stage), ((before // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(stage), V_BYTES)
                for part in gl.static_range(SPLIT):
                    block = gl.load(listed + entry(i - 1, part, count, SPLIT))
                    if VALUES_8:
                        load_box(
                            v_desc, [batch, head, 0, block * BLOCK_K], v_full.index(stage),
                            v_smem.index(SPLIT * stage + part),
                        )  # fmt: skip
                    else:
                        load_box(
                            v_desc, [batch, head, block * BLOCK_K, 0], v_full.index(stage),
                            v_smem.index(stage).slice(part * BLOCK_K, BLOCK_K, dim=2),
                        )  # fmt: skip
            n += (i < steps).to(gl.int32)
        turn += 1
        tile = following
    slot = turn & 1
    mbarrier.wait(tile_empty.index(slot), ((turn >> 1) & 1) ^ 1)
    tile_smem.index(slot).store(gl.full([1], total, gl.int32, ONE))
    mbarrier.arrive(tile_full.index(slot), count=1)


@gluon.jit
def _softmax(
    scores, factor, keep, peak, P: gl.constexpr, SPLIT: gl.constexpr, OFFSET: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """Weights of one tile as operands of the next product, and the running statistics.

    Args:
        scores: ``[rows, keys]`` fp32.
        factor: Of the scores of each block of the tile, ``[rows, SPLIT]``, base 2.
        keep: Keys that exist, or None.
        peak: Running maximum, ``[rows]``, base 2.
        P: Layout of the operands.
        SPLIT: Blocks in a tile.
        OFFSET: The largest weight is ``2 ** OFFSET``.
        dtype: Of the operands.
    """
    ROWS: gl.constexpr = scores.shape[0]
    KEYS: gl.constexpr = scores.shape[1]
    if keep is not None:
        scores = gl.where(keep[None, :], scores, float("-inf"))
    blocks = scores.reshape([ROWS, SPLIT, KEYS // SPLIT])
    highest = gl.max(gl.max(blocks, 2) * factor, 1)
    new_peak = gl.maximum(peak, gl.convert_layout(highest, peak.type.layout))
    shift = new_peak
    if keep is not None:
        shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = gl.exp2(peak - shift)
    lowered = gl.convert_layout(shift - OFFSET, highest.type.layout)
    weights = gl.exp2(blocks * factor[:, :, None] - lowered[:, None][:, :, None])
    weights = weights.reshape([ROWS, KEYS])
    added = gl.convert_layout(gl.sum(weights, 1), peak.type.layout)
    weights = weights.to(dtype)
    if dtype == gl.float8e4nv:
        # In the order of the stored values no thread needs what another one holds.
        weights = weights.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
        weights = weights.reshape([ROWS, KEYS])
    return gl.convert_layout(weights, P, assert_trivial=True), new_peak, decay, added


@gluon.jit
def _row_factor(
    q_factor, scale_smem, stage, TILE_K: gl.constexpr, SPLIT: gl.constexpr, S: gl.constexpr
):
    """Factor of the scores of every row and block of a tile, ``[rows, SPLIT]``, base 2."""
    # The layout of what is left of a tile's scores once the keys of each block are reduced.
    tile = gl.zeros([q_factor.shape[0], TILE_K], gl.float32, S)
    blocks = tile.reshape([q_factor.shape[0], SPLIT, TILE_K // SPLIT])
    REDUCED: gl.constexpr = gl.SliceLayout(2, blocks.type.layout)
    column = scale_smem.index(stage).load(gl.SliceLayout(0, REDUCED))
    return gl.convert_layout(q_factor, gl.SliceLayout(1, REDUCED))[:, None] * column[None, :]


@gluon.jit
def _weigh(p, v_smem, v_full, acc, n, clear, listed, count, key_valid, kv_len, i,
           DIM: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
           VALUES_8: gl.constexpr):  # fmt: skip
    """Starts the product of a tile's weights with its values.

    It is added to ``acc``, or with values in 8 bits replaces what is in there.
    """
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    stage = n % STAGES
    mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
    if VALUES_8:
        # Values of keys that do not exist were stored as 0.
        if SPLIT == 1:
            values = v_smem.index(stage).reshape([DIM, TILE_K]).permute((1, 0))
            token = warpgroup_mma(p, values, acc, use_acc=False, is_async=True)
        else:
            first, second = _halves(p, TILE_K)
            values = v_smem.index(2 * stage).reshape([DIM, BLOCK_K]).permute((1, 0))
            token = warpgroup_mma(first, values, acc, use_acc=False, is_async=True)
            values = v_smem.index(2 * stage + 1).reshape([DIM, BLOCK_K]).permute((1, 0))
            token = warpgroup_mma(second, values, token, is_async=True)
    else:
        values = v_smem.index(stage).reshape([TILE_K, DIM])
        if key_valid is not None:
            if clear:
                clear_values(values, i, listed, count, key_valid, kv_len, DIM, TILE_K, BLOCK_K)
        token = warpgroup_mma(p, values, acc, is_async=True)
    return token


@gluon.jit
def _halves(p, KEYS: gl.constexpr):
    """Columns of the first and of the second block of a tile, as operands."""
    OPERAND: gl.constexpr = p.type.layout
    first, second = p.reshape([p.shape[0], 2, KEYS // 2]).permute((0, 2, 1)).split()
    return (
        gl.convert_layout(first, OPERAND, assert_trivial=True),
        gl.convert_layout(second, OPERAND, assert_trivial=True),
    )


@gluon.jit
def _step(
    queries, k_smem, v_smem, scale_smem, k_full, k_empty, v_full, v_empty,
    p, acc, peak, decay, denom, n, more, keep, clear, i, listed, count, key_valid, kv_len, q_factor,
    S: gl.constexpr, P: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    TILE_K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, OFFSET: gl.constexpr,
    VALUES_8: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of the next tile while the values of the one before are multiplied."""
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    stage = n % STAGES
    before = (n - 1) % STAGES
    keys = k_smem.index(stage).reshape([TILE_K, DIM]).permute((1, 0))
    nothing = gl.zeros([ROWS, TILE_K], gl.float32, S)
    target = acc
    if VALUES_8:
        target = gl.zeros([ROWS, DIM], gl.float32, OUT)
    else:
        s_token = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
    o_token = _weigh(
        p, v_smem, v_full, target, n - 1, clear, listed, count, key_valid, kv_len, i - 1,
        DIM, TILE_K, BLOCK_K, STAGES, VALUES_8,
    )  # fmt: skip
    if VALUES_8:
        s_token = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
        product = warpgroup_mma_wait(1, deps=(o_token,))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None] + product
        scores = warpgroup_mma_wait(0, deps=(s_token,))
    else:
        scores = warpgroup_mma_wait(1, deps=(s_token,))
    factor = _row_factor(q_factor, scale_smem, stage, TILE_K, SPLIT, S)
    mbarrier.arrive(k_empty.index(stage), count=1)
    p_next, new_peak, decay_next, added = _softmax(
        scores, factor, keep, peak, P, SPLIT, OFFSET, p.dtype
    )
    denom = denom * decay_next + added
    n += 1
    # Also keeps the compiler from moving the exponentials behind the wait that follows.
    mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=more)
    if not VALUES_8:
        product = warpgroup_mma_wait(0, deps=(o_token,))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = product * gl.convert_layout(decay_next, OUT_ROW)[:, None]
    return p_next, acc, new_peak, decay_next, denom, n


@gluon.jit
def _attend_tiles(
    WHICH: gl.constexpr, q_smem, k_smem, v_smem, scale_smem, tile_smem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    out, lse, counts, indices, key_valid, valid_prefix, q_scale, shift, v_scale,
    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge, q_len, kv_len,
    scale_log2,
    DIM: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, VALUES_8: gl.constexpr,
):  # fmt: skip
    LN_2: gl.constexpr = 0.6931471805599453
    NEG_INF: gl.constexpr = float("-inf")
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    ROWS: gl.constexpr = TILE_Q // 2
    # 2 ** 8 is the largest power of two in e4m3.
    OFFSET: gl.constexpr = 8.0 if VALUES_8 else 0.0
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 32 if VALUES_8 else 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 4 if VALUES_8 else 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    S_COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    VALID: gl.constexpr = key_valid is not None
    MASKED: gl.constexpr = RAGGED or SPLIT > 1 or VALID
    dtype: gl.constexpr = out.dtype.element_ty
    weight_type: gl.constexpr = gl.float8e4nv if VALUES_8 else dtype
    n = 0
    turn = 0
    tile = next_tile(tile_smem, tile_full, tile_empty, turn)
    while tile < total:
        row, head, batch = locate(tile, total_edge, edge, q_tiles, heads)
        plane = batch.to(gl.int64) * heads + head
        mask_row = batch.to(gl.int64) * mask_batch + head * mask_head + row
        count = gl.load(counts + mask_row)
        listed = indices + mask_row * list_len
        steps = (count + SPLIT - 1) // SPLIT
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
        acc = gl.zeros([ROWS, DIM], gl.float32, OUT)
        denom = gl.full([ROWS], 0.0, gl.float32, S_ROW)
        peak = gl.full([ROWS], NEG_INF, gl.float32, S_ROW)
        first = row * TILE_Q + WHICH * ROWS
        s_rows = first + gl.arange(0, ROWS, S_ROW)
        at_rows = plane * q_len + s_rows
        live = s_rows < q_len
        q_factor = gl.load(q_scale + at_rows, mask=live, other=1.0) * scale_log2
        slot = turn & 1
        mbarrier.wait(q_full.index(slot), (turn >> 1) & 1)
        queries = q_smem.index(2 * slot + WHICH).reshape([ROWS, DIM])
        if steps > 0:
            stage = n % STAGES
            mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
            keys = k_smem.index(stage).reshape([TILE_K, DIM]).permute((1, 0))
            nothing = gl.zeros([ROWS, TILE_K], gl.float32, S)
            scores = warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            factor = _row_factor(q_factor, scale_smem, stage, TILE_K, SPLIT, S)
            mbarrier.arrive(k_empty.index(stage), count=1)
            keep = None
            if MASKED:
                keep = keep_columns(
                    0, 0, TILE_K, listed, count, flags, kv_len, S_COLUMN, TILE_K, BLOCK_K
                )
            p, peak, decay, denom = _softmax(
                scores, factor, keep, peak, P, SPLIT, OFFSET, weight_type
            )
            n += 1
            mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=steps > 1)
            if VALID:
                for i in range(1, gl.minimum(flagged + 1, steps)):
                    keep = keep_columns(
                        i, 0, TILE_K, listed, count, flags, kv_len, S_COLUMN, TILE_K, BLOCK_K
                    )
                    p, acc, peak, decay, denom, n = _step(
                        queries, k_smem, v_smem, scale_smem, k_full, k_empty, v_full, v_empty,
                        p, acc, peak, decay, denom, n, i + 1 < steps,
                        keep, i - 1 < flagged, i, listed, count, flags, kv_len, q_factor,
                        S, P, OUT, ROWS, DIM, TILE_K, BLOCK_K, STAGES, OFFSET, VALUES_8,
                    )  # fmt: skip
            for i in range(gl.maximum(gl.minimum(flagged + 1, steps), 1), steps):
                p, acc, peak, decay, denom, n = _step(
                    queries, k_smem, v_smem, scale_smem, k_full, k_empty, v_full, v_empty,
                    p, acc, peak, decay, denom, n, i + 1 < steps,
                    None, False, i, listed, count, None, kv_len, q_factor,
                    S, P, OUT, ROWS, DIM, TILE_K, BLOCK_K, STAGES, OFFSET, VALUES_8,
                )  # fmt: skip
            target = acc
            if VALUES_8:
                target = gl.zeros([ROWS, DIM], gl.float32, OUT)
            before = (n - 1) % STAGES
            o_token = _weigh(
                p, v_smem, v_full, target, n - 1, steps - 1 < flagged, listed, count, flags, kv_len,
                steps - 1, DIM, TILE_K, BLOCK_K, STAGES, VALUES_8,
            )  # fmt: skip
            product = warpgroup_mma_wait(0, deps=(o_token,))
            mbarrier.arrive(v_empty.index(before), count=1)
            if VALUES_8:
                acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None] + product
            else:
                acc = product
        mbarrier.arrive(q_empty.index(slot), count=1)
        turn += 1
        empty = denom == 0.0
        safe = gl.where(empty, 1.0, denom)
        natural = (peak + gl.log2(safe) - OFFSET) * LN_2
        natural = natural + gl.load(shift + at_rows, mask=live, other=0.0)
        gl.store(lse + at_rows, gl.where(empty, NEG_INF, natural), mask=live)
        acc = acc * gl.convert_layout(1.0 / safe, OUT_ROW)[:, None]
        dims = gl.arange(0, DIM, gl.SliceLayout(0, OUT))
        if VALUES_8:
            acc = acc * gl.load(v_scale + plane * DIM + dims)[None, :]
        o_rows = first + gl.arange(0, ROWS, OUT_ROW)
        o_at = ((batch.to(gl.int64) * q_len + o_rows) * heads + head) * DIM
        gl.store(out + o_at[:, None] + dims[None, :], acc.to(dtype), mask=(o_rows < q_len)[:, None])
        tile = next_tile(tile_smem, tile_full, tile_empty, turn)


@gluon.jit
def _attention_fp8_kernel(
    q_desc, k_desc, v_desc, out, lse, counter, counts, indices, key_valid, valid_prefix,
    q_scale, k_scale, v_scale, shift,
    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge, columns,
    q_len, kv_len, scale_log2,
    DIM: gl.constexpr, TILE_Q: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, RAGGED: gl.constexpr, VALUES_8: gl.constexpr,
):  # fmt: skip
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    dtype: gl.constexpr = out.dtype.element_ty
    eight: gl.constexpr = gl.float8e4nv
    one: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(eight, [4, 1, 1, TILE_Q // 2, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(eight, [STAGES, 1, 1, TILE_K, DIM], k_desc.layout)
    if VALUES_8:
        v_smem = gl.allocate_shared_memory(
            eight, [STAGES * SPLIT, 1, 1, DIM, BLOCK_K], v_desc.layout
        )
    else:
        v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, DIM], v_desc.layout)
    scale_smem = gl.allocate_shared_memory(gl.float32, [STAGES, SPLIT], one)
    tile_smem = gl.allocate_shared_memory(gl.int32, [2, 1], one)
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
                    0, q_smem, k_smem, v_smem, scale_smem, tile_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
                    out, lse, counts, indices, key_valid, valid_prefix, q_scale, shift, v_scale,
                    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge,
                    q_len, kv_len, scale_log2,
                    DIM, TILE_Q, TILE_K, BLOCK_K, STAGES, RAGGED, VALUES_8,
                ),
            ),
            (
                _attend_tiles,
                (
                    1, q_smem, k_smem, v_smem, scale_smem, tile_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
                    out, lse, counts, indices, key_valid, valid_prefix, q_scale, shift, v_scale,
                    mask_batch, mask_head, list_len, q_tiles, heads, total, edge, total_edge,
                    q_len, kv_len, scale_log2,
                    DIM, TILE_Q, TILE_K, BLOCK_K, STAGES, RAGGED, VALUES_8,
                ),
            ),
            (
                _load_tiles,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, scale_smem, tile_smem,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
                    counter, counts, indices, k_scale, mask_batch, mask_head, list_len, q_tiles,
                    heads, total, edge, total_edge, columns,
                    DIM, TILE_Q, TILE_K, BLOCK_K, STAGES, VALUES_8,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def reasons(call: AttentionCall) -> list[str]:
    """Why this kernel cannot compute ``call`` on Hopper; empty if it can."""
    found = []
    if call.q.shape[-1] not in (64, 128):
        found.append(f"takes head dims 64 and 128, got {call.q.shape[-1]}")
    if call.mask is None or call.v is None:
        found.append("takes calls with a mask and values")
    elif call.mask.block not in ((128, 64), (128, 128)):
        found.append(f"takes query blocks of 128, got blocks of {call.mask.block}")
    if call.v is not None and call.precision == "fp8_qk":
        found += box_reasons("v", call.v)
    # Gluon changes with triton: what a version makes of this file is tested before it is used.
    return found or probe_reasons("triton's 8-bit kernel for Hopper", launch, call)


def launch(call: AttentionCall) -> Attended:
    """Runs the kernel on a call for which ``reasons`` is empty.

    Returns:
        ``out [batch, q_len, heads, dim]`` and ``lse [batch, heads, q_len]`` fp32.
    """
    return launch_quantized(call, quantize(call, fragments=True))


def launch_quantized(call: AttentionCall, operands: Quantized) -> Attended:
    """:func:`launch` after the rounding, with ``operands.v`` in the order of the threads."""
    assert call.v is not None and call.mask is not None
    batch, q_len, heads, dim = call.q.shape
    kv_len = call.k.shape[1]
    out = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty((batch, heads, q_len), dtype=torch.float32)
    counter = call.q.new_empty(1, dtype=torch.int32)
    counts, indices = lists_of(call.mask, counter)
    block = call.mask.block[1]
    _, _, rows, columns = call.mask.shape
    flags, prefix = validity(call.key_valid)
    values_8 = operands.v is not None
    v = last_contiguous(call.v) if operands.v is None else operands.v
    queries, keys, values = call.keep(
        "fp8 boxes",
        lambda call: (
            box_shape(operands.q, [1, 1, TILE_Q // 2, dim]),
            box_shape(operands.k, [1, 1, block, dim]),
            box_shape(v, [1, 1, dim, block]) if values_8 else head_boxes(v, block),
        ),
    )
    total = rows * batch * heads
    edge = min(EDGE, rows // 2)
    launch_kernel(
        _attention_fp8_kernel, (min(total, multiprocessors(call.q.device)),),
        (Boxes(operands.q, queries), Boxes(operands.k, keys), Boxes(v, values), out, lse,
         counter, counts, indices, flags, prefix,
         operands.q_scale, operands.k_scale, operands.v_scale, operands.lift),
        (*list_steps(call.mask), rows, heads, total, edge, 2 * edge * batch * heads,
         columns, q_len, kv_len, call.scale * LOG2_E),
        DIM=dim, TILE_Q=TILE_Q, TILE_K=TILE_K, BLOCK_K=block,
        STAGES=4 if dim == 64 or values_8 else 3,
        RAGGED=kv_len % block != 0, VALUES_8=values_8, num_warps=4,
    )  # fmt: skip
    return Attended(out, lse)
