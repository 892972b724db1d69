"""Head patterns that a few numbers describe, so that kernels need no lists of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.layout import Ordering, TokenLayout, tile_ordering_on
from dit_sparse.mask import BlockMask, PackedMask, block_count

TokenOrder = Literal["frame_major", "position_major"]

# Wider than any sequence in blocks, and far from overflow when added to a block number.
WHOLE = 1 << 20


@dataclass(frozen=True, slots=True)
class HeadPattern:
    """What one head attends to: a band around the diagonal, evenly spaced key columns, or nothing.

    Among the N video blocks, query block r keeps key block c if ``|r - c| <= half_width``, or if c
    is one of the columns ``(i N + shift) // columns`` for i in 0..columns - 1.

    Attributes:
        half_width: Blocks kept on either side of the diagonal, in blocks; None for no band.
        columns: Number of evenly spaced key blocks that every query sees.
        shift: Where the columns start, as a share of their spacing in [0, 1).
        order: Order of the video tokens in which blocks are counted. Frame-major is the order of
            (frame, row, column); position-major that of (row, column, frame), in which one band
            holds a place and its surroundings in all frames: evenly spaced diagonals of the
            frame-major matrix.
        skip: Whether the head computes nothing: output 0, log-sum-exp ``-inf``, text included.

    Raises:
        ValueError: If a value is out of range, or nothing is kept without ``skip``.
    """

    half_width: int | None = None
    columns: int = 0
    shift: float = 0.0
    order: TokenOrder = "frame_major"
    skip: bool = False

    def __post_init__(self) -> None:
        if self.half_width is not None and self.half_width < 0:
            raise ValueError(f"half_width must be 0 or more blocks, got {self.half_width}")
        if self.columns < 0:
            raise ValueError(f"columns must be 0 or more, got {self.columns}")
        if not 0 <= self.shift < 1:
            raise ValueError(
                f"shift must be a share of the columns' spacing in [0, 1), got {self.shift}"
            )
        if self.order not in ("frame_major", "position_major"):
            raise ValueError(f"order must be 'frame_major' or 'position_major', got {self.order!r}")
        if self.skip == (self.half_width is not None or self.columns > 0):
            raise ValueError(
                "a head has a band or columns, or else is skipped, got "
                f"half_width={self.half_width}, columns={self.columns}, skip={self.skip}"
            )

    def kept(self, blocks: int) -> Tensor:
        """The kept pairs of ``blocks`` video blocks, bool ``[blocks, blocks]``."""
        keep = torch.zeros(blocks, blocks, dtype=torch.bool)
        if self.half_width is not None:
            places = torch.arange(blocks)
            keep |= (places[:, None] - places).abs() <= self.half_width
        keep[:, self.column_blocks(blocks)] = True
        return keep

    def column_blocks(self, blocks: int) -> list[int]:
        """The key blocks that are columns, ascending."""
        count, offset = self.spacing(blocks)
        return [(i * blocks + offset) // count for i in range(count)]

    def spacing(self, blocks: int) -> tuple[int, int]:
        """Number of columns among ``blocks`` blocks, and the shift in units of 1 / columns."""
        return min(self.columns, blocks), int(self.shift * blocks)


FULL = HeadPattern(half_width=WHOLE)
SKIP = HeadPattern(skip=True)


def band_width(density: float, tokens: int) -> float:
    """Half-width w in tokens for which ``|i - j| < w`` holds for ``density`` of all pairs.

    The band's area is ``1 - (1 - w / tokens)**2``.

    Source: SVG (arXiv 2502.01776), whose windows Sparse-vDiT's baselines follow.
    """
    return tokens * (1 - math.sqrt(1 - density))


def half_width(density: float, blocks: int) -> int:
    """Half-width in whole blocks of the band whose density is nearest to ``density``.

    A band of b blocks on either side has the area of ``|i - j| < b + 1/2``, up to a quarter of one
    block pair.
    """
    return min(max(round(band_width(density, blocks) - 0.5), 0), max(blocks - 1, 0))


@dataclass(frozen=True, slots=True, eq=False)
class BandMask:
    """One :class:`HeadPattern` for every head of a layer.

    What kernels prepare for a mask is kept with the object: use one for equal layers and steps.

    Blocks with text, the one in which video ends and text begins included, are kept as rows and as
    columns of every head that is not skipped.

    Attributes:
        heads: Pattern of each head.
        block: Tokens in a block.
        layout: What the tokens are, in the model's own order. Blocks count the video first, in the
            order of the head's pattern, and the text after it, wherever the model puts its text.

    Raises:
        ValueError: Without a head, or if ``block`` is not positive.
    """

    heads: tuple[HeadPattern, ...]
    block: int
    layout: TokenLayout

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError("a BandMask needs a pattern for each head, got none")
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")

    @property
    def blocks(self) -> int:
        """Blocks of the whole sequence."""
        return block_count(self.layout.tokens, self.block)

    @property
    def video_blocks(self) -> int:
        """Blocks of video alone, to which patterns apply."""
        return video_blocks(self.layout, self.block)

    def groups(self) -> dict[TokenOrder, tuple[int, ...]]:
        """The heads that compute anything, by token order; at most two groups."""
        found: dict[TokenOrder, list[int]] = {}
        for head, pattern in enumerate(self.heads):
            if not pattern.skip:
                found.setdefault(pattern.order, []).append(head)
        return {order: tuple(heads) for order, heads in found.items()}

    def ordering(self, order: TokenOrder, device: torch.device) -> Ordering | None:
        """How to reorder tokens into ``order``, text last; None if they are in it already."""
        frames, _, width = self.layout.grid
        if order == "position_major" and frames > 1:
            return tile_ordering_on(self.layout, (frames, 1, 1), device)
        if self.layout.video_start == 0:
            return None
        return tile_ordering_on(self.layout, (1, 1, width), device)

    def block_mask(self, heads: tuple[int, ...], device: torch.device | str = "cpu") -> BlockMask:
        """The same pattern as lists of blocks, for tokens in the order of these heads."""
        return _block_mask(tuple(self.heads[head] for head in heads), self.block, self.layout).to(
            device
        )

    def head_density(self, device: torch.device | str = "cpu") -> Tensor:
        """Kept pairs over all pairs of real tokens, fp32 ``[1, heads]``."""
        return _densities(self, torch.device(device))

    def tokens(self, head: int) -> Tensor:
        """The kept pairs in the model's token order, bool ``[tokens, tokens]``; for tests only."""
        keep = self.block_mask((head,)).tokens()[0, 0]
        order = self.ordering(self.heads[head].order, torch.device("cpu"))
        return keep if order is None else order.undo(order.undo(keep, 0), 1)


def video_blocks(layout: TokenLayout, block: int) -> int:
    """Blocks made of video alone, of tokens ordered video first.

    The block in which video ends and text begins counts as text.
    """
    return layout.video // block if layout.text else block_count(layout.video, block)


def _keep(heads: tuple[HeadPattern, ...], block: int, layout: TokenLayout) -> Tensor:
    """Kept blocks, bool ``[1, heads, blocks, blocks]``."""
    blocks, video = block_count(layout.tokens, block), video_blocks(layout, block)
    keep = torch.ones(1, len(heads), blocks, blocks, dtype=torch.bool)
    for head, pattern in enumerate(heads):
        keep[:, head, :video, :video] = pattern.kept(video)
        if pattern.skip:
            keep[:, head] = False
    return keep


@lru_cache(maxsize=64)
def _block_mask(heads: tuple[HeadPattern, ...], block: int, layout: TokenLayout) -> BlockMask:
    return BlockMask.from_dense(_keep(heads, block, layout), block, layout.tokens)


@lru_cache(maxsize=4096)
def _densities(bands: BandMask, device: torch.device) -> Tensor:
    values = [_density(pattern, bands.block, bands.layout) for pattern in bands.heads]
    return torch.tensor([values], device=device)


@lru_cache(maxsize=1024)
def _density(pattern: HeadPattern, block: int, layout: TokenLayout) -> float:
    keep = _keep((pattern,), block, layout)
    return PackedMask.from_dense(keep, block, layout.tokens).density()
