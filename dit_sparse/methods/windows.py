"""Masks that depend on the token grid alone: windows in raster order and in tile order.

Blocks with text are kept as rows and as columns. Every function expects the tokens ordered video
first (:meth:`dit_sparse.methods.base.Call.tile_order`) and keeps its results, so that a mask is
made once for all layers and steps.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import video_blocks


@lru_cache(maxsize=64)
def raster_window(
    layout: TokenLayout, sparsity: float, block: int, device: torch.device
) -> PackedMask:
    """The blocks that a band over the raster index within a frame touches, in every frame.

    Query i and key j belong together where ``|r_i - r_j| <= int(n * (1 - s)) // 2``, with r the
    position in the own frame of n = height * width tokens, whichever frames they are in. A block
    is kept if it holds one such pair, so more is kept than ``1 - s``. ``s = 0`` keeps everything.

    Args:
        layout: What the tokens are.
        sparsity: s, the share of a frame outside the band.
        block: Tokens in a block.
        device: Of the mask.

    Returns:
        One mask for all batch elements and heads.

    Source: Re-ttention (arXiv 2505.22918), the sliding window of ``module/Cog_processor.py`` in its
    code; for a single frame it is the band of ``module/pixart_processor.py``.
    """
    frame = layout.grid[1] * layout.grid[2]
    half = frame if sparsity == 0 else int(frame * (1 - sparsity)) // 2
    # Which positions of a frame each block holds; in small frames a block holds several frames.
    token = torch.arange(layout.video)
    holds = torch.zeros(block_count(layout.video, block), frame)
    holds[token // block, token % frame] = 1
    # ... and which ones its band reaches: those with a held position at most half away.
    before = torch.nn.functional.pad(holds.cumsum(1), (1, 0))
    place = torch.arange(frame)
    last, first = (place + half + 1).clamp(max=frame), (place - half).clamp(min=0)
    reaches = (before[:, last] - before[:, first] > 0).float()
    return _with_text(reaches @ holds.T > 0, layout, block, device)


@lru_cache(maxsize=64)
def nearest_window(
    layout: TokenLayout,
    sparsity: float,
    block: int,
    tile: tuple[int, int, int] | None,
    device: torch.device,
) -> PackedMask:
    """The ``round((1 - s) N)`` of the N video blocks around each block, in three dimensions.

    Distance is the largest of the distances between block centres along the three axes, each as a
    share of the grid's extent, so the window has the shape of the grid (of a frame, for an image)
    and moves inwards at the borders instead of being cut off there.

    Args:
        layout: What the tokens are.
        sparsity: s, the share of video blocks that a row skips.
        block: Tokens in a block.
        tile: Order of the video tokens, see :meth:`dit_sparse.methods.base.Call.tile_order`.
        device: Of the mask.

    Returns:
        One mask for all batch elements and heads.
    """
    order = TokenLayout(layout.grid).ordering(tile or (1, 1, layout.grid[2]))
    coords = TokenLayout(layout.grid).coords()[order.perm] / torch.tensor(layout.grid)
    owner = torch.arange(layout.video) // block
    blocks = block_count(layout.video, block)
    centre = torch.zeros(blocks, 3).index_add_(0, owner, coords) / owner.bincount()[:, None]
    blocks = video_blocks(layout, block)
    centre = centre[:blocks]
    apart = (centre[:, None] - centre).abs()
    # Where several are equally far along one axis, the nearer ones along the others go first.
    distance = apart.amax(-1) + 1e-3 * apart.norm(dim=-1)
    rank = distance.argsort(dim=-1, stable=True).argsort(dim=-1)
    return _with_text(rank < max(1, round((1 - sparsity) * blocks)), layout, block, device)


def _with_text(keep: Tensor, layout: TokenLayout, block: int, device: torch.device) -> PackedMask:
    """Adds the blocks with text to a bool matrix of video blocks ``[q_blocks, kv_blocks]``."""
    blocks, video = block_count(layout.tokens, block), video_blocks(layout, block)
    whole = torch.ones(blocks, blocks, dtype=torch.bool)
    whole[:video, :video] = keep[:video, :video]
    longest = int(whole.sum(-1).max())
    return PackedMask.from_dense(whole.to(device)[None, None], block, layout.tokens, longest)
