"""Choosing windows, strides and tiles of generalized neighborhood attention for a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dit_sparse.neighborhood import Neighborhood, Triple, axis_windows

# Windows that a plan proposes are at least so many groups of queries wide. Below three, queries at
# the edge of a group look much further to one side than to the other.
MIN_GROUPS = 3
# Proposed beside those that divide an axis.
FURTHER_STRIDES = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """A neighborhood, and the order of tokens that makes it fast.

    Attributes:
        neighborhood: The windows.
        tile: Tokens along (frames, height, width) that the token order keeps together.
        block: Tokens in a query and a key block.
        estimate: Estimated share of block pairs that attention visits; the density and what is
            wasted at the borders of windows and blocks.
    """

    neighborhood: Neighborhood
    tile: Triple
    block: int
    estimate: float


@lru_cache(maxsize=4096)
def _axis_share(
    length: int, window: int, stride: int, dilation: int, causal: bool, extent: int
) -> tuple[float, float, int]:
    """Along one axis in tiles of ``extent``: what whole tiles cost.

    Returns:
        The share of pairs computed, the mean number of tiles visited, and the common divisor of the
        tiles' sizes.
    """
    ordered = sorted(axis_windows(length, window, stride, dilation, causal))
    computed = visited = tiles = divisor = end = 0
    for residue in range(dilation):
        begin, end = end, end + len(range(residue, length, dilation))
        for start in range(begin, end, extent):
            stop = min(start + extent, end)
            low = (ordered[start].low - begin) // extent
            high = -(-(ordered[stop - 1].high - begin) // extent)
            computed += (stop - start) * (min(begin + high * extent, end) - begin - low * extent)
            visited += high - low
            tiles += 1
            divisor = math.gcd(divisor, stop - start)
    return computed / length**2, visited / tiles, divisor


def visited_share(neighborhood: Neighborhood, tile: Triple, block: int) -> float:
    """Estimated share of block pairs visited under the token order of ``tile``.

    Whole tiles are counted exactly. Blocks cut a run of adjacent kept tiles at its ends, which
    adds ``(block - g) / run`` to queries and keys each, with g the common divisor of the block and
    of all tiles, the smaller ones at the far edges included.
    """
    share, run, covers, common = 1.0, float(math.prod(tile)), True, 1
    for axis in (2, 1, 0):
        computed, visited, divisor = _axis_share(
            neighborhood.grid[axis],
            neighborhood.window[axis],
            neighborhood.stride[axis],
            neighborhood.dilation[axis],
            neighborhood.causal[axis],
            tile[axis],
        )
        share *= computed
        common *= divisor
        # Width is innermost: its kept tiles are adjacent, and those of the next axis if it is full.
        run *= visited if covers else 1
        covers &= not neighborhood.restricts(axis)
    extra = 0 if covers else (block - math.gcd(block, common)) / run
    return min(share * (1 + extra) ** 2, 1.0)


def best_tile(neighborhood: Neighborhood, block: int) -> Triple:
    """The tile with the least estimated work; of equals the one with fewest tokens.

    Tried are tiles of a few tokens and of whole axes, and of whole groups of queries where a window
    restricts the axis.
    """
    if math.prod(neighborhood.grid) <= block:
        return neighborhood.grid
    options = []
    for axis, length in enumerate(neighborhood.grid):
        extents = {length, 1, 2, 4, 8}
        if neighborhood.restricts(axis):
            stride = neighborhood.stride[axis]
            extents |= {3, 5, 6, 7, 10, 12, 16, stride, 2 * stride}
        longest = -(-length // neighborhood.dilation[axis])
        options.append(sorted({min(extent, longest) for extent in extents}))
    frames, height, width = options
    tiles = [
        (t, h, w) for t, h, w in itertools.product(frames, height, width) if t * h * w >= block
    ]
    tiles = tiles or [neighborhood.grid]
    return min(
        tiles, key=lambda tile: (visited_share(neighborhood, tile, block), math.prod(tile), tile)
    )


@lru_cache(maxsize=64)
def propose(grid: Triple, density: float, block: int = 128) -> tuple[Plan, ...]:
    """Windows of about ``density`` that fill whole blocks on ``grid``, best first.

    Axes get a full window, or windows of an odd number of groups of queries, which begin and end on
    the border of a group; at the edges of the grid too where the groups divide the axis. A tile of
    the token order is one group, so only blocks on the border of two tiles are partial.

    Ranked by the sum of three losses, in nats: missing the density, visiting more than is kept,
    and a third of what the shape misses: windows should hold all frames and equal shares of height
    and width. The last is a prior, not a measurement: transformers that were trained with GNA
    (Cosmos-Predict2) have such windows, and they waste least.

    Args:
        grid: Tokens along (frames, height, width).
        density: Kept pairs over all pairs, in (0, 1).
        block: Tokens in a query and a key block.

    Returns:
        At least one plan, the best for each size of windows. On grids of few tokens none may be
        near the density.
    """
    if not 0 < density < 1:
        raise ValueError(f"density must be in (0, 1), got {density}")
    best: dict[Triple, tuple[float, Plan]] = {}
    for tolerance in (1.25, math.inf):
        for neighborhood, kept in _candidates(grid, density, tolerance):
            tile = _grown(neighborhood, block)
            estimate = visited_share(neighborhood, tile, block)
            frames, height, width = (w / n for w, n in zip(neighborhood.window, grid, strict=True))
            loss = abs(math.log(kept / density)) + math.log(max(estimate / kept, 1.0))
            loss += (abs(math.log(height / width)) - math.log(frames)) / 3
            known = best.get(neighborhood.window)
            if known is None or loss < known[0]:
                best[neighborhood.window] = loss, Plan(neighborhood, tile, block, estimate)
        if best:
            break
    ranked = sorted(best.values(), key=lambda found: (found[0], found[1].neighborhood.window))
    return tuple(plan for _, plan in ranked)


def _candidates(
    grid: Triple, density: float, tolerance: float
) -> Iterator[tuple[Neighborhood, float]]:
    """Neighborhoods of windows that fit their groups, and their densities."""
    for found in itertools.product(*(_axis_options(length) for length in grid)):
        kept = math.prod(option.share for option in found)
        if 1 / tolerance <= kept / density <= tolerance:
            t, h, w = found
            window, stride = (t.window, h.window, w.window), (t.stride, h.stride, w.stride)
            yield Neighborhood(grid, window, stride), kept


def _grown(neighborhood: Neighborhood, block: int) -> Triple:
    """The smallest tile of whole groups, or of groups doubled, that holds a block."""
    grid = neighborhood.grid
    tile = [
        step if size < length else length
        for step, size, length in zip(neighborhood.stride, neighborhood.window, grid, strict=True)
    ]
    while math.prod(tile) < min(block, math.prod(grid)):
        axis = min((a for a in range(3) if tile[a] < grid[a]), key=lambda a: tile[a])
        tile[axis] = min(2 * tile[axis], grid[axis])
    return tile[0], tile[1], tile[2]


class _Option(NamedTuple):
    window: int
    stride: int
    share: float


@lru_cache(maxsize=64)
def _axis_options(length: int) -> tuple[_Option, ...]:
    options = [_Option(length, 1, 1.0)]
    for stride in range(1, length // MIN_GROUPS + 1):
        if length % stride == 0 or stride in FURTHER_STRIDES:
            for window in range(MIN_GROUPS * stride, length, 2 * stride):
                options.append(_Option(window, stride, window / length))
    return tuple(options)
