"""Strides of a video: token sets that repeat at equal distance, and orders that gather them.

A stride sigma splits the tokens into classes of equal ``index mod sigma``. Which classes these are
depends on the axis that runs fastest in the index, so a stride is named by the axes whose position
it holds fixed: in raster order (frames, height, width) the stride W fixes the column, ``"w"``, and
H W the place in the frame, ``"hw"``. With time fastest, (height, width, frames), the stride T fixes
the frame, ``"t"``, and W T column and frame, ``"wt"``; (width, frames, height) gives ``"h"`` and
``"th"``. These are all six ways to fix one or two of the three axes.

Source: MMInference (arXiv 2504.16083), section 3.2 and table 4, whose strides are the frame stride
and free ones of a raster sequence.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout, tile_ordering_on
from dit_sparse.mask import block_count

# The axes from slowest to fastest in which the named axes come last.
_ORDERS = {
    "w": (0, 1, 2),
    "hw": (0, 1, 2),
    "t": (1, 2, 0),
    "wt": (1, 2, 0),
    "h": (2, 0, 1),
    "th": (2, 0, 1),
}
_NAME = re.compile(r"([1-9]\d*)?(hw|wt|th|h|w|t)|([1-9]\d*)")


def check_stride(name: object) -> None:
    """Refuses what :func:`residues` cannot read.

    Raises:
        ValueError: If ``name`` is not a stride.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"a stride is one of {sorted(_ORDERS)}, a multiple such as '2hw', or a number of "
            f"tokens in raster order such as '24', got {name!r}"
        )


def residues(name: str, layout: TokenLayout) -> tuple[int, Tensor]:
    """The stride in tokens, and the class of every video token.

    Args:
        name: Axes held fixed, with a factor before them for a multiple of their stride (``"2hw"``:
            the place in the frame and whether the frame is odd), or a number of tokens in raster
            order.
        layout: Only its grid matters.

    Returns:
        sigma and ``index mod sigma``, ``[video]`` int64, tokens in raster order.
    """
    check_stride(name)
    factor, axes, free = _NAME.fullmatch(name).groups()  # type: ignore[union-attr]
    order = _ORDERS[axes or "w"]
    sizes = [layout.grid[axis] for axis in order]
    index = torch.arange(layout.video).view(sizes)
    # From the order in which the index counts back to raster order.
    index = index.permute([order.index(axis) for axis in range(3)]).flatten()
    sigma = int(free) if free else int(factor or 1) * math.prod(sizes[3 - len(axes) :])
    # Longer than the video: every token is a class of its own.
    sigma = min(sigma, layout.video)
    return sigma, index % sigma


class TokenGroup:
    """Some of the video tokens, in every order that a head may choose; perhaps text behind them.

    Order 0 is that of the tiles, order 1 + k gathers the classes of stride k: sorted by residue and
    by raster index within. "Block" is a block of the chosen order that holds video alone.

    Made by :func:`token_group` and shared by all layers, branches and generations. Not a dataclass:
    those are looked into for what a generation keeps.

    Attributes:
        tokens: Positions in the sequence, ``[size]`` int64: video in raster order, then text.
        video: How many of them are video, n.
        block: Tokens in a block.
        blocks: Blocks of video alone, N.
        orders: Places in ``tokens`` of the video tokens, by order: ``[1 + strides, n]`` int64.
        place: Block of each token in each order, ``[1 + strides, n]`` int64; N or more for the
            tokens of a block that text shares.
        rank: Where the video tokens in order 0 stand among all video tokens in it, ascending,
            ``[n]`` int64.
        sigma: Stride in tokens, by stride.
        residue: Class of each video token, ``[strides, n]`` int64.
        members: Places of the tokens of each class, by stride ``[sigma, most]`` int64, filled up
            with n.
        low: Smallest residue in each block, ``[1 + strides, N]`` int64; order 0 has none and says
            0 here and -1 in ``high``.
        high: Largest residue in each block, same shape.
    """

    def __init__(
        self,
        tokens: Tensor,
        video: int,
        block: int,
        orders: Tensor,
        rank: Tensor,
        sigma: tuple[int, ...],
        residue: Tensor,
    ) -> None:
        self.tokens, self.video, self.block = tokens, video, block
        self.orders, self.rank, self.sigma, self.residue = orders, rank, sigma, residue
        text = len(tokens) > video
        self.blocks = video // block if text else block_count(video, block)
        self.place = torch.empty_like(orders)
        block_of = torch.arange(video, device=orders.device) // block
        self.place.scatter_(-1, orders, block_of.expand_as(orders))
        starts = torch.arange(self.blocks, device=orders.device) * block
        ends = (starts + block).clamp(max=video) - 1
        ordered = residue.gather(-1, orders[1:])
        none = residue.new_zeros(1, self.blocks)
        self.low = torch.cat([none, ordered[:, starts]])
        self.high = torch.cat([none - 1, ordered[:, ends]])
        self.members = tuple(
            _members(one, order, size)
            for one, order, size in zip(residue, orders[1:], sigma, strict=True)
        )

    @property
    def size(self) -> int:
        """Number of tokens, text included."""
        return self.tokens.shape[0]

    @property
    def usable(self) -> tuple[bool, ...]:
        """Whether each stride makes a grid: two classes or more, of two tokens or more."""
        return tuple(2 <= sigma <= self.video // 2 for sigma in self.sigma)


Ranges = tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def token_group(
    layout: TokenLayout,
    ranges: Ranges | None,
    text: bool,
    strides: tuple[str, ...],
    tile: tuple[int, int, int] | None,
    block: int,
    device: torch.device,
) -> TokenGroup:
    """The video tokens in ``ranges``, kept on ``device`` so that they are made once.

    Args:
        layout: The whole sequence.
        ranges: (start, stop) in the model's token order, ascending; text in them is left out. None
            means all.
        text: Whether all text follows, if there is any.
        strides: See :func:`residues`.
        tile: Tokens of a tile of order 0, or None for raster order.
        block: Tokens in a block.
        device: Where the tensors go.
    """
    raster = torch.arange(layout.video)
    if ranges is not None:
        position = raster + layout.video_start
        raster = raster[sum(((position >= a) & (position < b)).long() for a, b in ranges) > 0]
    rank = raster
    if tile is not None:
        rank = tile_ordering_on(layout, tile, torch.device("cpu")).inverse
        rank = rank[layout.video_start : layout.video_start + layout.video][raster]
    found = [residues(name, layout) for name in strides]
    residue = torch.stack([r[raster] for _, r in found])
    orders = torch.cat([rank[None].argsort(-1), residue.argsort(dim=-1, stable=True)])
    parts = [raster + layout.video_start]
    if text:
        parts.append(torch.arange(layout.text_before))
        parts.append(torch.arange(layout.text_before + layout.video, layout.tokens))
    return TokenGroup(
        tokens=torch.cat(parts).to(device),
        video=len(raster),
        block=block,
        orders=orders.to(device),
        rank=rank.sort().values.to(device),
        sigma=tuple(sigma for sigma, _ in found),
        residue=residue.to(device),
    )


def _members(residue: Tensor, order: Tensor, sigma: int) -> Tensor:
    """See :class:`TokenGroup`; ``order`` sorts ``residue``."""
    size = residue.bincount(minlength=sigma)
    first = size.cumsum(0) - size
    members = residue.new_full((sigma, int(size.max())), len(residue))
    rank = torch.arange(len(residue), device=residue.device) - first[residue[order]]
    members[residue[order], rank] = order
    return members
