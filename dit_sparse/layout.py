"""What each position of a token sequence is, and orders in which to lay the tokens out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The tokens that a self-attention layer sees.

    Attributes:
        grid: Video tokens along (frames, height, width), row-major with width fastest; one frame
            for an image.
        text: Tokens joined to the video tokens that stay exact: text, and whatever else a model
            puts beside the grid (reference images, history, registers, padding). 0 where text has
            its own cross-attention.
        order: Whether the text stands after or before the video, or on both sides.
        text_before: Text tokens in front of the video. Given only with the order ``"split"``; the
            other orders imply it.

    Raises:
        ValueError: If a count is impossible or the order is unknown.
    """

    grid: tuple[int, int, int]
    text: int = 0
    order: Literal["video_text", "text_video", "split"] = "video_text"
    text_before: int = -1

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(
                f"grid must be (frames, height, width) of at least one token each, got {self.grid}"
            )
        if self.text < 0:
            raise ValueError(f"text must be a number of tokens, 0 or more, got {self.text}")
        if self.order not in ("video_text", "text_video", "split"):
            raise ValueError(
                f"order must be 'video_text', 'text_video' or 'split', got {self.order!r}"
            )
        if self.order == "split":
            # Text on one side only has an order of its own: equal layouts must compare equal.
            if not 0 < self.text_before < self.text:
                raise ValueError(
                    f"the order 'split' has text on both sides of the video, got {self.text_before}"
                    f" of {self.text} tokens before it; use 'video_text' or 'text_video'"
                )
            return
        implied = self.text if self.order == "text_video" else 0
        if self.text_before not in (-1, implied):
            raise ValueError(
                f"text_before goes with the order 'split', got {self.text_before} with "
                f"{self.order!r}"
            )
        object.__setattr__(self, "text_before", implied)

    @classmethod
    def around(cls, grid: tuple[int, int, int], before: int = 0, after: int = 0) -> TokenLayout:
        """A grid with ``before`` text tokens in front of it and ``after`` behind it.

        Raises:
            ValueError: If a count is negative.
        """
        if before < 0 or after < 0:
            raise ValueError(f"text before and after must be 0 or more tokens, got {before, after}")
        if before and after:
            return cls(grid, before + after, "split", before)
        return cls(grid, before + after, "text_video" if before else "video_text")

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of tokens in the sequence."""
        return self.video + self.text

    @property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.text_before

    def coords(self) -> Tensor:
        """(frame, row, column) of every token, ``[tokens, 3]`` int64; -1 on text."""
        axes = torch.meshgrid(*(torch.arange(n) for n in self.grid), indexing="ij")
        coords = torch.full((self.tokens, 3), -1)
        coords[self.video_start : self.video_start + self.video] = torch.stack(axes, -1).view(-1, 3)
        return coords

    def ordering(self, tile: tuple[int, int, int]) -> Ordering:
        """The order that makes every ``tile`` of the grid one run of tokens, text last.

        Args:
            tile: Tokens of a tile along (frames, height, width). Where it does not divide the grid
                the tiles at the far edges are smaller and nothing is padded.
        """
        return _tile_ordering(self, tuple(tile))


@dataclass(frozen=True, slots=True, eq=False)
class Ordering:
    """A permutation of the tokens of a sequence.

    Attributes:
        perm: Position in the original sequence of each token of the new one, ``[tokens]`` int64.
        inverse: The permutation that undoes it, ``[tokens]`` int64.
    """

    perm: Tensor
    inverse: Tensor

    @classmethod
    def from_perm(cls, perm: Tensor) -> Ordering:
        return cls(perm, torch.argsort(perm))

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x`` with its tokens (dimension ``dim``) in the new order."""
        return _take(x, self.perm, dim)

    def undo(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x`` with its tokens (dimension ``dim``) back in the original order."""
        return _take(x, self.inverse, dim)

    def to(self, device: torch.device | str) -> Ordering:
        return Ordering(self.perm.to(device), self.inverse.to(device))


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    if dim != 1 or not x.is_cuda:
        return x.index_select(dim, index)
    # torch's own selection takes a slow path for heads that lie before tokens in memory.
    from dit_sparse.kernels import ops

    return ops.reorder(index, x)[0]


@lru_cache(maxsize=64)
def _tile_ordering(layout: TokenLayout, tile: tuple[int, ...]) -> Ordering:
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"tile must be (frames, height, width) of at least one token, got {tile}")
    video = layout.coords()[layout.video_start : layout.video_start + layout.video]
    tiles, within = video // torch.tensor(tile), video % torch.tensor(tile)
    # Sort by tile first, then by place in the tile; both row-major.
    rank = torch.zeros(layout.video, dtype=torch.int64)
    for axis in range(3):
        rank = rank * -(-layout.grid[axis] // tile[axis]) + tiles[:, axis]
    for axis in range(3):
        rank = rank * tile[axis] + within[:, axis]
    video_order = layout.video_start + torch.argsort(rank)
    before = torch.arange(layout.text_before)
    after = torch.arange(layout.text_before + layout.video, layout.tokens)
    return Ordering.from_perm(torch.cat([video_order, before, after]))


@lru_cache(maxsize=64)
def tile_ordering_on(
    layout: TokenLayout, tile: tuple[int, int, int], device: torch.device
) -> Ordering:
    """:meth:`TokenLayout.ordering` on ``device``, kept so that it is uploaded once."""
    return layout.ordering(tile).to(device)


@lru_cache(maxsize=64)
def spread_rows_on(
    layout: TokenLayout, tile: tuple[int, int, int], stride: int, device: torch.device
) -> Tensor:
    """One of every ``stride`` tokens in the order of :meth:`TokenLayout.ordering`, spread evenly.

    Every ``stride``-th token would be of the same columns in all rows of a tile. Of each run of
    ``stride`` tokens the one is taken whose place is (frame + row) modulo the stride: of two a
    checkerboard, of four in a tile of 4 x 4 x 4 four in each frame, row and column.

    Args:
        layout: What the tokens are.
        tile: Of the order.
        stride: How many tokens one stands for.
        device: Where the result is kept.

    Returns:
        Places in that order, ascending, ``[ceil(tokens / stride)]`` int64.
    """
    starts = torch.arange(0, layout.tokens, stride)
    coords = layout.coords()[layout.ordering(tile).perm[starts]]
    rows = starts + coords[:, :2].sum(1) % stride
    return rows.clamp(max=layout.tokens - 1).to(device)
