"""Neighborhood windows as blocks: which are seen whole, which in part, and the rule inside those.

A window is a box of places (see :mod:`dit_sparse.neighborhood`), so a handful of integers a token
decides every pair; no matrix over pairs of tokens exists anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.layout import Ordering, TokenLayout
from dit_sparse.mask import BlockMask, PackedMask, block_count
from dit_sparse.neighborhood import Neighborhood, Triple

_UNBOUNDED = torch.iinfo(torch.int32).max
# A block is told apart by tile up to so many tiles; the rest of it counts as one piece.
_MAX_PIECES = 4


@dataclass(frozen=True, slots=True, eq=False)
class NeighborhoodMask:
    """What every query sees, for tokens ordered by tiles with text last.

    Query i sees key j if ``low[a, i] <= place[a, j] < high[a, i]`` along every restricted axis a,
    or if either of the two is text. The same for all batch elements and heads.

    Attributes:
        full: Blocks of which every pair is visible, or None if there are none.
        partial: Blocks in which the rule decides, or None if there are none: then attention is
            block-sparse and needs no rule. A few may hold no visible pair.
        visited: ``full`` and ``partial`` together.
        place: Place of each key along the restricted axes, ``[axes, tokens]`` int32.
        low: First place that each query sees, same shape.
        high: One past the last, same shape.
        video: Tokens before the text.
        head_density: Visible pairs over all pairs of tokens, ``[1, 1]`` fp32.
    """

    full: BlockMask | None
    partial: BlockMask | None
    visited: BlockMask
    place: Tensor
    low: Tensor
    high: Tensor
    video: int
    head_density: Tensor

    @property
    def block(self) -> tuple[int, int]:
        return self.visited.block

    @property
    def device(self) -> torch.device:
        return self.place.device

    def to(self, device: torch.device | str) -> NeighborhoodMask:
        values = (getattr(self, f.name) for f in fields(self))
        return NeighborhoodMask(*(v.to(device) if hasattr(v, "to") else v for v in values))

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The rule, for any blocks.

        Args:
            queries: Positions, ``[m]`` int64.
            keys: Positions, ``[n]`` int64.

        Returns:
            ``[m, n]`` bool.
        """
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool, device=self.device)
        for place, low, high in zip(self.place, self.low, self.high, strict=True):
            at = place[keys]
            seen &= (at >= low[queries, None]) & (at < high[queries, None])
        return seen | (keys >= self.video)


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """How GNA runs on one layout.

    Attributes:
        order: The order of the tokens, or None if they are in it already.
        mask: What each query sees, in that order.
    """

    order: Ordering | None
    mask: NeighborhoodMask


@lru_cache(maxsize=8)
def arrange(
    layout: TokenLayout,
    neighborhood: Neighborhood,
    tile: Triple,
    block: int,
    device: torch.device,
) -> Arrangement:
    """The order and the mask of ``neighborhood``: a pure function, kept so that it is made once.

    Tokens are laid out tile by tile, row-major inside; with dilation the classes of an axis lie
    apart. Tiles at the far edges may be smaller and nothing is padded, so behind a tile that is no
    multiple of ``block`` a block spans the border between two tiles. A tile of exactly one block
    makes each block a box; a tile of many blocks, such as one group of strided queries over all
    frames, leaves few blocks on a border and fits any grid.

    Args:
        layout: The tokens, whose grid is that of ``neighborhood``.
        neighborhood: The windows.
        tile: Tokens of a tile along (frames, height, width).
        block: Tokens in a query and a key block.
        device: Where the results live.
    """
    grid = layout.grid
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    windows = [torch.tensor(neighborhood.windows(a)) for a in range(3)]
    segments = [torch.tensor(neighborhood.segments(a, tile[a])) for a in range(3)]
    places = [windows[a][axes[a].flatten(), 0] for a in range(3)]
    tiles = torch.zeros(layout.video, dtype=torch.int64)
    rank = torch.zeros_like(tiles)
    for axis in range(3):
        tiles = tiles * (int(segments[axis][-1]) + 1) + segments[axis][places[axis]]
        rank = rank * grid[axis] + places[axis]
    video_order = (tiles * layout.video + rank).argsort()
    before = torch.arange(layout.video_start)
    after = torch.arange(layout.video_start + layout.video, layout.tokens)
    perm = torch.cat([layout.video_start + video_order, before, after])
    identity = torch.equal(perm, torch.arange(layout.tokens))
    restricted = [a for a in range(3) if neighborhood.restricts(a)]
    table = torch.zeros(3, len(restricted), layout.tokens, dtype=torch.int32)
    table[2] = _UNBOUNDED  # text queries see everything
    for row, axis in enumerate(restricted):
        coordinate = axes[axis].flatten()[video_order]
        table[:, row, : layout.video] = windows[axis][coordinate].T.int()
    full, visited = _blocks(table[..., : layout.video], tiles[video_order], layout, block)
    pairs = math.prod(neighborhood.pairs(a) for a in range(3))
    pairs += layout.tokens**2 - layout.video**2
    partial = visited & ~full
    mask = NeighborhoodMask(
        _lists(full, block, layout.tokens) if full.any() else None,
        _lists(partial, block, layout.tokens) if partial.any() else None,
        _lists(visited, block, layout.tokens),
        table[0],
        table[1],
        table[2],
        layout.video,
        torch.full((1, 1), pairs / layout.tokens**2),
    )
    order = None if identity else Ordering.from_perm(perm).to(device)
    return Arrangement(order, mask.to(device))


def _blocks(table: Tensor, tiles: Tensor, layout: TokenLayout, block: int) -> tuple[Tensor, Tensor]:
    """Blocks that are seen whole, and blocks that may hold a visible pair.

    Both ``[blocks, blocks]`` bool. The first is exact: all pairs are visible if and only if the
    extremes along every axis are. The second is exact for boxes, and a superset where a block is
    no box.

    Args:
        table: Place, low and high of the video tokens in order, ``[3, axes, video]`` int32.
        tiles: Tile of each of them, ``[video]`` int64.
        layout: The tokens.
        block: Tokens in a block.
    """
    blocks, video_blocks = block_count(layout.tokens, block), block_count(layout.video, block)
    owner = torch.arange(layout.video) // block
    begins = torch.ones(layout.video, dtype=torch.bool)
    begins[1:] = tiles[1:] != tiles[:-1]
    number = begins.long().cumsum(0)
    piece = (number - number[owner * block]).clamp(max=_MAX_PIECES - 1)
    pieces = int(piece.max()) + 1
    slot = owner * pieces + piece

    full = torch.ones(blocks, blocks, dtype=torch.bool)
    near = torch.ones(pieces, pieces, video_blocks, video_blocks, dtype=torch.bool)
    for place, low, high in table.unbind(1):
        first, last = (_extreme(place, slot, m, video_blocks * pieces) for m in ("amin", "amax"))
        inner = [_extreme(x, owner, m, video_blocks) for x, m in ((low, "amax"), (high, "amin"))]
        outer = [
            _extreme(x, slot, m, video_blocks * pieces).view(-1, pieces)
            for x, m in ((low, "amin"), (high, "amax"))
        ]
        first, last = first.view(-1, pieces), last.view(-1, pieces)
        full[:video_blocks, :video_blocks] &= (inner[0][:, None] <= first.amin(1)) & (
            inner[1][:, None] > last.amax(1)
        )
        for p in range(pieces):
            for c in range(pieces):
                near[p, c] &= (outer[0][:, None, p] <= last[:, c]) & (
                    outer[1][:, None, p] > first[:, c]
                )
    visited = torch.ones_like(full)
    # The block in which video ends and text begins is visited like text.
    pure = layout.video // block if layout.text else video_blocks
    visited[:pure, :pure] = near.any(0).any(0)[:pure, :pure]
    return full, visited


def _extreme(values: Tensor, slot: Tensor, mode: str, slots: int) -> Tensor:
    """Smallest or largest value of each slot, ``[slots]``; of an empty one, beyond all others."""
    beyond = _UNBOUNDED if mode == "amin" else -1
    found = torch.full((slots,), beyond, dtype=values.dtype)
    return found.scatter_reduce_(0, slot, values, mode)


def _lists(keep: Tensor, block: int, tokens: int) -> BlockMask:
    longest = int(keep.sum(-1).max())
    return PackedMask.from_dense(keep[None, None], block, tokens, longest).lists()
