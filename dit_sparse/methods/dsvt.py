"""DSVT: windows cut into equal sets, along another axis in every other layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.layout import Ordering, TokenLayout
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import Call, check_box, video_blocks
from dit_sparse.methods.scored import BlockMasked, check_count


@dataclass(frozen=True)
class DSVT(BlockMasked):
    """Attention inside sets: slices of a window along the height, in odd layers along the width.

    The tokens of a window, sorted along one axis, are split into S equal sets: token k of N goes to
    set ``k S // N``. The next layer sorts along the other axis, so that two layers connect all
    tokens of a window; after each such pair the windows shift by half their size, which connects
    windows. A pair of blocks is kept if any of their tokens share a set, so sets that do not end at
    a block border cost up to a block more.

    The paper's voxels are sparse and its sets therefore index occupied voxels; on a dense grid its
    formula is this split. It expects training.

    Attributes:
        sets: S, sets in a window.
        window: (frames, height, width) in tokens, or None for one window of the whole grid. None is
            the default because windows of fixed size keep next to nothing of a long video.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2301.06051, section 3.2.
    """

    name = "dsvt"

    sets: int = 4
    window: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sets", self.sets)
        check_box("window", self.window)

    @classmethod
    def exact(cls) -> DSVT:
        return cls(sets=1, warmup=0)

    def at_budget(self, share: float) -> DSVT:
        return replace(self, sets=max(1, round(1 / share)))

    def order(self, call: Call) -> Ordering:
        return self._partition(call)[0]

    def find(self, call: Call) -> PackedMask:
        video = video_blocks(call.layout, self.block)
        tokens = min(video * self.block, call.layout.video)
        member = self._partition(call)[1][:tokens]
        # Sets ascend along the order: a block spans those of its first to its last token.
        first = member[:: self.block]
        last = member[self.block - 1 :: self.block]
        if len(last) < block_count(tokens, self.block):
            last = torch.cat([last, member[-1:]])
        keep = (first[:, None] <= last) & (last[:, None] >= first)
        return self.pack(call, keep[None, None])

    def _partition(self, call: Call) -> tuple[Ordering, Tensor]:
        layout = call.layout
        window = self.window or layout.grid
        pair, axis = divmod(call.layer, 2)
        shifted = pair % 2 == 1 and self.window is not None
        return set_partition(layout, window, self.sets, 1 + axis, shifted, call.q.device)


@lru_cache(maxsize=64)
def set_partition(
    layout: TokenLayout,
    window: tuple[int, int, int],
    sets: int,
    axis: int,
    shifted: bool,
    device: torch.device,
) -> tuple[Ordering, Tensor]:
    """The order in which sets are runs, text last, and the set of every video token in it.

    Args:
        layout: What the tokens are.
        window: Tokens of a window along (frames, height, width).
        sets: Sets in a window.
        axis: Of the grid, along which a window is sliced.
        shifted: Whether windows start half a window early.
        device: Where to put both.

    Returns:
        The order, and numbers of sets ``[video]`` int64, ascending.
    """
    start = layout.video_start
    coords = layout.coords()[start : start + layout.video]
    size = torch.tensor(window)
    place = coords + (size // 2 if shifted else 0)
    counts = (place // size).amax(0) + 1
    number = ((place // size) * torch.tensor([counts[1] * counts[2], counts[2], 1])).sum(-1)
    grid = torch.tensor(layout.grid)
    others = [a for a in range(3) if a != axis]
    rank = number
    for a in (axis, *others):
        rank = rank * grid[a] + coords[:, a]
    order = rank.argsort()
    number = number[order]
    # Place of a token in its window, and tokens in that window.
    held = number.bincount()
    first = held.cumsum(0) - held
    within = torch.arange(layout.video) - first[number]
    member = number * sets + within * sets // held[number]
    after = torch.arange(start + layout.video, layout.tokens)
    perm = torch.cat([start + order, torch.arange(start), after])
    return Ordering.from_perm(perm).to(device), member.to(device)
