"""Attention mass of every block for Hopper in Gluon, Triton's lower level.

One persistent program a multiprocessor, as in :mod:`dit_sparse.kernels.gluon.attention`: a single
warp loads tiles of keys through TMA into a ring, two groups of four warps take 64 queries each.
Nothing but keys is read and one number leaves for a tile, so that products and exponentials are all
there is to do, and each takes as long as the other. A group has two tiles of scores: while the
tensor cores fill one, it computes the exponentials of the other.

A thread adds up what it holds of a tile and puts the sum into shared memory; every ``RING`` tiles
the group sums these over its threads and stores one number for each key block. Groups write rows of
their own, 64 queries each; query blocks of 128 are added afterwards. Of query blocks of 32 or 16,
which searches have that look at some queries only, a group has two or four: each warp holds 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_sparse.kernels.gluon.boxes import box_reasons, head_boxes, load_box, multiprocessors
from dit_sparse.kernels.ops import BlockMassCall
from dit_sparse.kernels.probe_mass import mass_reasons
from dit_sparse.kernels.triton_common import LOG2_E, as_float, last_contiguous
from dit_sparse.kernels.triton_launch import Boxes, launch_kernel
from dit_sparse.kernels.triton_padding import validity
from dit_sparse.mask import block_count

ROWS = 64  # queries of a group
GROUPS = 2
TILE_K = 128
STAGES = 3  # tiles of keys in shared memory
RING = 16  # tiles, an even number, whose sums stay in shared memory before they are stored
NAME = "triton's block mass for Hopper"
_memory = gl.shared_memory_descriptor
# Triton 3.6 has it under a private name.
_reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret


@gluon.jit
def _locate(unit, q_tiles, parts, k_tiles):
    """(query tile, batch element and head, first key tile, the one after the last) of a unit."""
    # Query tiles change fastest: programs that run at the same time share their keys in L2.
    rest = unit // q_tiles
    part = rest % parts
    return unit % q_tiles, rest // parts, part * k_tiles // parts, (part + 1) * k_tiles // parts


@gluon.jit
def _load_tiles(
    q_desc, k_desc, q_smem, k_smem, q_full, q_empty, k_full, k_empty,
    total, q_tiles, parts, k_tiles, heads,
    DIM: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    n = 0
    turn = 0
    unit = gl.program_id(0)
    while unit < total:
        row, plane, first, last = _locate(unit, q_tiles, parts, k_tiles)
        head, batch = plane % heads, plane // heads
        buffer = turn & 1
        mbarrier.wait(q_empty.index(buffer), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(buffer), GROUPS * ROWS * DIM * 2)
        for group in gl.static_range(GROUPS):
            at = [batch, head, (row * GROUPS + group) * ROWS, 0]
            load_box(q_desc, at, q_full.index(buffer), q_smem.index(buffer * GROUPS + group))
        for tile in range(first, last):
            stage = n % STAGES
            mbarrier.wait(k_empty.index(stage), ((n // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), TILE_K * DIM * 2)
            load_box(
                k_desc, [batch, head, tile * TILE_K, 0], k_full.index(stage), k_smem.index(stage)
            )
            n += 1
        turn += 1
        unit += gl.num_programs(0)


@gluon.jit
def _multiply(
    queries, k_smem, n, S: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    TILE_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts the product of the queries with the ``n``-th tile of keys, which has arrived."""
    keys = k_smem.index(n % STAGES).reshape([TILE_K, DIM]).permute((1, 0))
    nothing = gl.zeros([ROWS, TILE_K], gl.float32, S)
    return warpgroup_mma(queries, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _add_up(
    scores, shift, scale_log2, sums, MASKED: gl.constexpr, tile, key_valid, kv_len,
    TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Stores what each thread holds of the mass of a tile to ``sums [key blocks, threads]``."""
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    S: gl.constexpr = scores.type.layout
    weights = gl.exp2(scores * scale_log2 - shift[:, None])
    if MASKED:
        token = tile * TILE_K + gl.arange(0, TILE_K, gl.SliceLayout(0, S))
        keep = token < kv_len
        if key_valid is not None:
            keep = keep & (gl.load(key_valid + token, mask=keep, other=0) != 0)
        weights = gl.where(keep[None, :], weights, 0.0)
    # A thread has two rows of its warp's 16, and two columns of every eight: no sum below leaves
    # it. The longest comes first, as four chains.
    parts = weights.reshape([4, 2, 8, SPLIT, BLOCK_K // 8, 4, 2])
    parts = gl.sum(gl.sum(gl.sum(parts, 4), 5), 1)
    parts = parts.permute((2, 0, 1, 3)).reshape([SPLIT, 128])
    sums.store(parts)


@gluon.jit
def _flush(
    ring, mass, first, last, columns, rows_left, SEGMENTS: gl.constexpr, TILE_K: gl.constexpr,
    BLOCK_K: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Sums the tiles ``first..last`` over threads and stores them to ``SEGMENTS`` rows of ``mass``.

    Of these rows there are ``rows_left``.
    """
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    COUNT: gl.constexpr = RING * SPLIT * SEGMENTS
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    sums = _reinterpret(ring, gl.float32, [COUNT, 128 // SEGMENTS], FLAT)
    found = gl.sum(sums.load(LAYOUT), 1)
    place = gl.arange(0, COUNT, gl.SliceLayout(1, LAYOUT))
    row, column = place % SEGMENTS, first * SPLIT + place // SEGMENTS
    keep = (column < last * SPLIT) & (column < columns) & (row < rows_left)
    gl.store(mass + row * columns + column, found, mask=keep)


@gluon.jit
def _sum_tiles(
    WHICH: gl.constexpr, ring, q_smem, k_smem, q_full, q_empty, k_full, k_empty,
    mass, lse, key_valid, valid_prefix,
    total, q_tiles, parts, k_tiles, heads, rows, columns, q_len, kv_len, scale_log2,
    DIM: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, SEGMENTS: gl.constexpr,
    TILE_K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    VALID: gl.constexpr = key_valid is not None
    MASKED: gl.constexpr = RAGGED or VALID
    LOG2_E: gl.constexpr = 1.4426950408889634
    n = 0
    turn = 0
    unit = gl.program_id(0)
    while unit < total:
        row, plane, first, last = _locate(unit, q_tiles, parts, k_tiles)
        group_row = row * GROUPS + WHICH
        at_rows = group_row * ROWS + gl.arange(0, ROWS, S_ROW)
        lse_at = lse + plane.to(gl.int64) * q_len + at_rows
        # Empty rows and rows past the end contribute exp2(-inf) = 0.
        shift = gl.load(lse_at, mask=at_rows < q_len, other=float("inf"))
        shift = gl.where(shift == float("-inf"), float("inf"), shift * LOG2_E)
        mass_row = mass + (plane.to(gl.int64) * rows + group_row * SEGMENTS) * columns
        rows_left = rows - group_row * SEGMENTS
        pairs = (last - first - 1) // 2
        plain = pairs
        flags = key_valid
        if VALID:
            flags = key_valid + (plane // heads).to(gl.int64) * kv_len
            inside = gl.load(valid_prefix + plane // heads) // TILE_K
            plain = gl.minimum(gl.maximum(inside - first, 0) // 2, pairs)
        buffer = turn & 1
        mbarrier.wait(q_full.index(buffer), (turn >> 1) & 1)
        queries = q_smem.index(buffer * GROUPS + WHICH).reshape([ROWS, DIM])
        mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1)
        even = _multiply(queries, k_smem, n, S, ROWS, DIM, TILE_K, STAGES)
        mbarrier.wait(
            k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=first + 1 < last
        )
        for pair in range(0, plain):
            even, n = _pair(
                even, queries, k_smem, k_full, k_empty, ring, n, pair, first, last, shift,
                scale_log2, mass_row, columns, rows_left, False, None, kv_len,
                S, DIM, ROWS, SEGMENTS, TILE_K, BLOCK_K, STAGES, RING,
            )  # fmt: skip
        if VALID:
            for pair in range(plain, pairs):
                even, n = _pair(
                    even, queries, k_smem, k_full, k_empty, ring, n, pair, first, last, shift,
                    scale_log2, mass_row, columns, rows_left, True, flags, kv_len,
                    S, DIM, ROWS, SEGMENTS, TILE_K, BLOCK_K, STAGES, RING,
                )  # fmt: skip
        # One or two tiles are left; two fit the ring, whose size is even.
        tile = first + 2 * pairs
        start = (2 * pairs) % RING
        begun = tile - start
        if tile + 1 < last:
            scores = warpgroup_mma_wait(0, deps=(even,))
            mbarrier.arrive(k_empty.index(n % STAGES), count=1)
            n += 1
            odd = _multiply(queries, k_smem, n, S, ROWS, DIM, TILE_K, STAGES)
            _add_up(
                scores, shift, scale_log2, ring.index(start), MASKED, tile, flags, kv_len,
                TILE_K, BLOCK_K,
            )  # fmt: skip
            scores = warpgroup_mma_wait(0, deps=(odd,))
            start += 1
            tile += 1
        else:
            scores = warpgroup_mma_wait(0, deps=(even,))
        mbarrier.arrive(k_empty.index(n % STAGES), count=1)
        n += 1
        mbarrier.arrive(q_empty.index(buffer), count=1)
        _add_up(
            scores, shift, scale_log2, ring.index(start), MASKED, tile, flags, kv_len,
            TILE_K, BLOCK_K,
        )  # fmt: skip
        _flush(ring, mass_row, begun, last, columns, rows_left, SEGMENTS, TILE_K, BLOCK_K, RING)
        turn += 1
        unit += gl.num_programs(0)


@gluon.jit
def _pair(
    even, queries, k_smem, k_full, k_empty, ring, n, pair, first, last, shift,
    scale_log2, mass_row, columns, rows_left, MASKED: gl.constexpr, key_valid, kv_len,
    S: gl.constexpr, DIM: gl.constexpr, ROWS: gl.constexpr, SEGMENTS: gl.constexpr,
    TILE_K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Two tiles, the first of which is being multiplied; starts the one after them."""
    # Two, because scores that stay in their registers need no move from one turn to the next.
    tile = first + 2 * pair
    slot = (2 * pair) % RING
    scores = warpgroup_mma_wait(0, deps=(even,))
    mbarrier.arrive(k_empty.index(n % STAGES), count=1)
    odd = _multiply(queries, k_smem, n + 1, S, ROWS, DIM, TILE_K, STAGES)
    mbarrier.wait(k_full.index((n + 2) % STAGES), ((n + 2) // STAGES) & 1)
    _add_up(
        scores, shift, scale_log2, ring.index(slot), MASKED, tile, key_valid, kv_len,
        TILE_K, BLOCK_K,
    )  # fmt: skip
    scores = warpgroup_mma_wait(0, deps=(odd,))
    mbarrier.arrive(k_empty.index((n + 1) % STAGES), count=1)
    even = _multiply(queries, k_smem, n + 2, S, ROWS, DIM, TILE_K, STAGES)
    # At least one more tile follows.
    mbarrier.wait(k_full.index((n + 3) % STAGES), ((n + 3) // STAGES) & 1, pred=tile + 3 < last)
    _add_up(
        scores, shift, scale_log2, ring.index(slot + 1), MASKED, tile + 1, key_valid, kv_len,
        TILE_K, BLOCK_K,
    )  # fmt: skip
    if slot + 2 == RING:
        _flush(
            ring, mass_row, tile - slot, tile + 2, columns, rows_left, SEGMENTS, TILE_K, BLOCK_K,
            RING,
        )  # fmt: skip
    return even, n + 2


@gluon.jit
def _block_mass_kernel(
    q_desc, k_desc, mass, lse, key_valid, valid_prefix,
    total, q_tiles, parts, k_tiles, heads, rows, columns, q_len, kv_len, scale_log2,
    DIM: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, SEGMENTS: gl.constexpr,
    TILE_K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr,
    RAGGED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    q_smem = gl.allocate_shared_memory(dtype, [2 * GROUPS, 1, 1, ROWS, DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE_K, DIM], k_desc.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ring_0 = gl.allocate_shared_memory(gl.float32, [RING, SPLIT, 128], flat)
    ring_1 = gl.allocate_shared_memory(gl.float32, [RING, SPLIT, 128], flat)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for buffer in gl.static_range(2):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_empty.index(buffer), count=GROUPS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
    gl.warp_specialize(
        [
            (
                _sum_tiles,
                (
                    0, ring_0, q_smem, k_smem, q_full, q_empty, k_full, k_empty,
                    mass, lse, key_valid, valid_prefix, total, q_tiles, parts, k_tiles, heads,
                    rows, columns, q_len, kv_len, scale_log2,
                    DIM, ROWS, GROUPS, SEGMENTS, TILE_K, BLOCK_K, STAGES, RING, RAGGED,
                ),
            ),
            (
                _sum_tiles,
                (
                    1, ring_1, q_smem, k_smem, q_full, q_empty, k_full, k_empty,
                    mass, lse, key_valid, valid_prefix, total, q_tiles, parts, k_tiles, heads,
                    rows, columns, q_len, kv_len, scale_log2,
                    DIM, ROWS, GROUPS, SEGMENTS, TILE_K, BLOCK_K, STAGES, RING, RAGGED,
                ),
            ),
            (
                _load_tiles,
                (
                    q_desc, k_desc, q_smem, k_smem, q_full, q_empty, k_full, k_empty,
                    total, q_tiles, parts, k_tiles, heads,
                    DIM, ROWS, GROUPS, TILE_K, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def reasons(call: BlockMassCall) -> list[str]:
    """Why this kernel cannot compute ``call`` on Hopper; empty if it can."""
    found = []
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"takes bfloat16 and float16, got {call.q.dtype}")
    if call.q.shape[-1] not in (64, 128):
        found.append(f"takes head dims 64 and 128, got {call.q.shape[-1]}")
    for name, tensor in (("q", call.q), ("k", call.k)):
        found += box_reasons(name, tensor)
    # Gluon changes with triton: what a version makes of this file is tested before it is used.
    return found or mass_reasons(NAME, launch, call)


def _parts(units: int, k_tiles: int, programs: int) -> int:
    """Into how many ranges of keys a query tile is split, so that programs end together."""
    # Beside its tiles a unit costs the time of about one: at its end nothing is multiplied.
    choices = range(1, min(8, max(1, k_tiles // (2 * RING))) + 1)
    return min(choices, key=lambda n: -(-units * n // programs) * (-(-k_tiles // n) + 1))


def launch(call: BlockMassCall) -> Tensor:
    """Runs the kernel on a call for which ``reasons`` is empty.

    Returns:
        ``[batch, heads, q_blocks, kv_blocks]`` fp32.
    """
    q, k = last_contiguous(call.q), last_contiguous(call.k)
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    block_q, block_k = call.block
    q_blocks, columns = block_count(q_len, block_q), block_count(kv_len, block_k)
    segments, halves = max(1, ROWS // block_q), max(1, block_q // ROWS)
    rows = q_blocks * halves
    q_tiles, k_tiles = block_count(rows, GROUPS * segments), block_count(kv_len, TILE_K)
    flags, prefix = validity(call.key_valid)
    mass = q.new_empty((batch, heads, rows, columns), dtype=torch.float32)
    programs, units = multiprocessors(q.device), q_tiles * batch * heads
    parts = _parts(units, k_tiles, programs)
    total = units * parts
    launch_kernel(
        _block_mass_kernel, (min(total, programs),),
        (Boxes(q, head_boxes(q, ROWS)), Boxes(k, head_boxes(k, TILE_K)), mass,
         as_float(call.lse), flags, prefix),
        (total, q_tiles, parts, k_tiles, heads, rows, columns, q_len, kv_len, call.scale * LOG2_E),
        DIM=dim, ROWS=ROWS, GROUPS=GROUPS, SEGMENTS=segments, TILE_K=TILE_K, BLOCK_K=block_k,
        STAGES=STAGES, RING=RING, RAGGED=kv_len % TILE_K != 0, num_warps=4,
    )  # fmt: skip
    if halves == 1:
        return mass
    return mass.view(batch, heads, q_blocks, halves, columns).sum(-2)
