"""What kernels in Gluon for Hopper share that walk lists of key blocks, tile by tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

TILE_Q = 128
TILE_K = 128
# Query tiles at either end of a sequence that are computed before all others.
EDGE = 4


@gluon.jit
def entry(i, part, count, SPLIT: gl.constexpr):
    """Place in its list of the key block that is part ``part`` of a row's ``i``-th tile."""
    # From the end, since only the last blocks may need masking. A list that does not fill its tiles
    # gives its last entry twice, in the first tile.
    return count - 1 - gl.maximum(i * SPLIT + part - count % SPLIT, 0)


@gluon.jit
def locate(tile, total_edge, edge, q_tiles, heads):
    """(query tile, head, batch element) that is computed as the ``tile``-th."""
    # Rows at both ends of a sequence may hold text, hence be the longest: they come first, so that
    # none is left for the end. Then head by head, whose keys stay in the L2 cache.
    edges = gl.maximum(2 * edge, 1)
    inner = gl.maximum(q_tiles - 2 * edge, 1)
    outer = tile % edges
    outer_row = gl.where(outer < edge, outer, q_tiles - 2 * edge + outer)
    rest = tile - total_edge
    is_edge = tile < total_edge
    row = gl.where(is_edge, outer_row, edge + rest % inner)
    plane = gl.where(is_edge, tile // edges, rest // inner)
    return row, plane % heads, plane // heads


@gluon.jit
def next_tile(tile_smem, tile_full, tile_empty, turn):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = turn & 1
    mbarrier.wait(tile_full.index(slot), (turn >> 1) & 1)
    tile = gl.max(tile_smem.index(slot).load(ONE), 0)
    mbarrier.arrive(tile_empty.index(slot), count=1)
    return tile


@gluon.jit
def keep_columns(
    i, first: gl.constexpr, size: gl.constexpr, listed, count, key_valid, kv_len,
    LAYOUT: gl.constexpr, TILE_K: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Which of ``size`` keys from ``first`` on of a row's ``i``-th tile exist, once: bool."""
    SPLIT: gl.constexpr = TILE_K // BLOCK_K
    place = first + gl.arange(0, size, LAYOUT)
    block = gl.load(listed + entry(i, 0, count, SPLIT))
    token = block * BLOCK_K + place
    once = token >= 0
    if SPLIT > 1:
        other = gl.load(listed + entry(i, 1, count, SPLIT))
        token = gl.where(place < BLOCK_K, token, other * BLOCK_K + place - BLOCK_K)
        once = (place < BLOCK_K) | (i > 0) | (count % SPLIT == 0)
    keep = once & (token < kv_len)
    if key_valid is not None:
        keep = keep & (gl.load(key_valid + token, mask=keep, other=0) != 0)
    return keep


@gluon.jit
def clear_values(
    values, i, listed, count, key_valid, kv_len, DIM: gl.constexpr, TILE_K: gl.constexpr,
    BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Zeroes the values of keys that do not exist: 0 * NaN would be NaN."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, VECTOR)
    PART: gl.constexpr = 32
    for part in gl.static_range(TILE_K // PART):
        keep = keep_columns(
            i, part * PART, PART, listed, count, key_valid, kv_len, ROW, TILE_K, BLOCK_K
        )
        rows = values.slice(part * PART, PART, dim=0)
        loaded = rows.load(VECTOR)
        rows.store(gl.where(keep[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
