"""Windows of generalized neighborhood attention (GNA): which keys each query of a grid sees.

Pure integer geometry, one axis at a time: a pair of tokens is kept if it is kept along frames,
height and width alike. Nothing here imports torch.

Source: Generalized Neighborhood Attention, arXiv 2504.16922, section 3, in the exact form of its
reference implementation NATTEN (0.21), borders, even windows and dilation included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

Triple = tuple[int, int, int]
AXES = ("frames", "height", "width")
T = TypeVar("T", int, bool)


class Window(NamedTuple):
    """What one query sees along one axis: the keys whose place is in ``low..high - 1``.

    The place of a coordinate is its index after sorting the axis by dilation class: classes one
    after another, ascending inside each. Without dilation it is the coordinate. In places every
    window is one contiguous run, dilated or not.
    """

    place: int
    low: int
    high: int


@lru_cache(maxsize=512)
def axis_windows(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> tuple[Window, ...]:
    """The windows of all queries along one axis, by coordinate.

    Queries in groups of ``stride`` share the window of their leader, the middle query (the right
    one of two), or with ``causal`` the last. A window that would cross a border is shifted inside,
    so every query sees exactly ``window`` keys; an even window has one key more on the left. With
    ``causal`` no key after the query is seen, and windows at the start hold fewer. With
    ``dilation`` g all this holds inside each of the g classes of coordinates congruent modulo g.

    Args:
        length: Tokens along the axis.
        window: Keys of a window, ``1 <= window * dilation <= length``.
        stride: Queries in a group, at most ``window``.
        dilation: Distance between neighbouring keys of a window.
        causal: Whether keys after the query are hidden.
    """
    found: list[Window | None] = [None] * length
    offset = 0
    for residue in range(dilation):
        members = range(residue, length, dilation)
        count = len(members)
        for index, coordinate in enumerate(members):
            group = index // stride * stride
            if causal:
                leader = min(group + stride - 1, count - 1)
                low, high = max(leader - window + 1, 0), index + 1
            else:
                leader = min(group + stride // 2, count - 1)
                low = min(max(leader - window // 2, 0), count - window)
                high = low + window
            found[coordinate] = Window(offset + index, offset + low, offset + high)
        offset += count
    return tuple(w for w in found if w is not None)


@dataclass(frozen=True, slots=True)
class Neighborhood:
    """GNA on one grid, every parameter along (frames, height, width).

    Make it with :meth:`on`, which takes ints as well and validates.

    Attributes:
        grid: Tokens.
        window: Keys of a window.
        stride: Queries that share a window: 1 is neighborhood attention, the window itself is
            blocked (window self-) attention.
        dilation: Distance between neighbouring keys of a window.
        causal: Axes along which no later key is seen.
    """

    grid: Triple
    window: Triple
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)

    @classmethod
    def on(
        cls,
        grid: Triple,
        window: int | Sequence[int] = -1,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
    ) -> Neighborhood:
        """The neighborhood with one value for all axes or one for each.

        Args:
            grid: Tokens along (frames, height, width).
            window: Keys of a window; -1 is the widest the axis holds, ``length // dilation``.
            stride: See :class:`Neighborhood`.
            dilation: See :class:`Neighborhood`.
            causal: See :class:`Neighborhood`.

        Raises:
            ValueError: If a window does not fit its axis or a stride exceeds its window.
        """
        sizes, steps = triple("window", window), triple("stride", stride)
        gaps, past = triple("dilation", dilation), triple("causal", causal)
        widest = [length // gap if gap > 0 else 0 for length, gap in zip(grid, gaps, strict=True)]
        sizes = _triple(w if size == -1 else size for size, w in zip(sizes, widest, strict=True))
        for name, length, size, step, gap in zip(AXES, grid, sizes, steps, gaps, strict=True):
            if gap < 1 or step < 1:
                raise ValueError(
                    f"stride and dilation must be at least 1, got {step} and {gap} along {name}"
                )
            if not 1 <= size <= length // gap:
                raise ValueError(
                    f"the window along {name} must be in 1..{length // gap} (a grid of {length} "
                    f"with dilation {gap}), or -1 for all of it, got {size}"
                )
            if step > size:
                raise ValueError(
                    f"the stride along {name} must be at most the window, {size}, or queries "
                    f"would not see themselves; got {step}"
                )
        return cls(_triple(grid), sizes, steps, gaps, past)

    def windows(self, axis: int) -> tuple[Window, ...]:
        """:func:`axis_windows` of one axis (0 frames, 1 height, 2 width)."""
        return axis_windows(
            self.grid[axis],
            self.window[axis],
            self.stride[axis],
            self.dilation[axis],
            self.causal[axis],
        )

    def restricts(self, axis: int) -> bool:
        """Whether some query does not see some key along ``axis``."""
        return self.pairs(axis) < self.grid[axis] ** 2

    def pairs(self, axis: int) -> int:
        """Pairs of query and key coordinates kept along ``axis``."""
        return sum(window.high - window.low for window in self.windows(axis))

    def density(self) -> float:
        """Kept pairs over all pairs of the grid's tokens."""
        return math.prod(self.pairs(axis) for axis in range(3)) / math.prod(self.grid) ** 2

    def segments(self, axis: int, extent: int) -> tuple[int, ...]:
        """Segment of every place along ``axis``: tiles of ``extent``, begun anew in each class.

        The last tile of a class may be smaller.
        """
        found: list[int] = []
        for residue in range(self.dilation[axis]):
            count = len(range(residue, self.grid[axis], self.dilation[axis]))
            first = found[-1] + 1 if found else 0
            found += [first + index // extent for index in range(count)]
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Simulation:
    """Key tiles that the query tiles of a neighborhood visit under multi-dimensional tiling.

    Attributes:
        total: Key tiles of the grid, all of which dense attention visits.
        most: Visited by the query tile that visits most.
        mean: Visited on average.
        block_sparse: Whether no visited pair of tiles needs a fine mask.
        padding: Tokens over tokens with each axis padded to whole tiles, of queries and keys:
            dense attention that does not pad does this share of the padded work.
    """

    total: int
    most: int
    mean: float
    block_sparse: bool
    padding: float

    @property
    def speedup(self) -> float:
        """Upper bound of the speed-up of attention where the slowest tile decides (the paper's)."""
        return self.total / self.most

    @property
    def mean_speedup(self) -> float:
        """The same where query tiles share the device evenly, as in a persistent kernel."""
        return self.total / self.mean


def simulate(neighborhood: Neighborhood, q_tile: Triple, kv_tile: Triple) -> Simulation:
    """Counts what a kernel with tiles ``q_tile`` and ``kv_tile`` computes.

    Along an axis the query tile from the first to the last query visits the key tiles from the one
    in which the first query's window starts to the one in which the last query's window ends; over
    axes the counts multiply. Key tiles lie at multiples of their size (static tiling).

    Args:
        neighborhood: The windows.
        q_tile: Queries of a tile along (frames, height, width).
        kv_tile: Keys of a tile.

    Source: arXiv 2504.16922, section 4.1 (its simulator was not published); the count is the trip
    count of the reference kernels.
    """
    total, most, mean, padding, whole = 1, 1, 1.0, 1.0, True
    for axis in range(3):
        visits, tiles, blocks = _axis_visits(neighborhood, axis, q_tile[axis], kv_tile[axis])
        total *= tiles
        most *= max(visits)
        mean *= sum(visits) / len(visits)
        length = neighborhood.grid[axis]
        padding *= length / (len(visits) * q_tile[axis]) * length / (tiles * kv_tile[axis])
        whole &= blocks
    return Simulation(total, most, mean, whole, padding)


def _axis_visits(
    neighborhood: Neighborhood, axis: int, q_tile: int, kv_tile: int
) -> tuple[list[int], int, bool]:
    """Key tiles visited by every query tile, all key tiles, and whether whole tiles are visible."""
    visits, tiles, whole, end = [], 0, True, 0
    ordered = sorted(neighborhood.windows(axis))
    dilation = neighborhood.dilation[axis]
    for residue in range(dilation):
        begin, end = end, end + len(range(residue, neighborhood.grid[axis], dilation))
        tiles += -(-(end - begin) // kv_tile)
        for start in range(begin, end, q_tile):
            tile = ordered[start : min(start + q_tile, end)]
            low, high = tile[0].low - begin, tile[-1].high - begin
            visits.append(-(-high // kv_tile) - low // kv_tile)
            shared = all((w.low, w.high) == (tile[0].low, tile[0].high) for w in tile)
            ends_whole = high % kv_tile == 0 or high == end - begin
            whole &= shared and low % kv_tile == 0 and ends_whole
    return visits, tiles, whole


def end_to_end(speedup: float, share: float) -> float:
    """Speed-up of a whole generation (Amdahl).

    Args:
        speedup: Of self-attention.
        share: Of the dense generation's time that the sped-up calls take: self-attention's share
            times the share of steps that are sparse.
    """
    return 1 / (1 - share + share / speedup)


def triple(name: str, value: T | Sequence[T]) -> tuple[T, T, T]:
    """One value along each axis.

    Raises:
        ValueError: If ``value`` is neither one value nor three of one kind (ints, or bools).
    """
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    kind = bool if name == "causal" else int
    if len(values) != 3 or any(type(v) is not kind for v in values):
        raise ValueError(
            f"{name} must be one {kind.__name__}, or three along (frames, height, width), got "
            f"{value!r}"
        )
    return values


def _triple(values) -> Triple:
    frames, height, width = values
    return frames, height, width
