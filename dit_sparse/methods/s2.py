"""S2-Attention: every head reads its own shard of the keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.scored import Tiled, check_count


@dataclass(frozen=True)
class S2(Tiled):
    """A local band and every v-th key block, another one for each head; nothing is searched.

    Head h keeps key block c for query block p where ``|p - c| <= band`` or
    ``(c + h * step + layer) mod v == 0`` with ``step = max(1, v // heads)``. The shards of v heads
    cover all blocks; with fewer heads consecutive layers do, by the shift by ``layer``, which is
    ours. This is the paper's absolute form: for bidirectional attention its code defaults to one
    relative to p, in which the head number has no part and all heads read alike. The pattern was
    made to be trained with.

    Attributes:
        stride: v; of the blocks outside the band a head keeps 1 in v.
        band: Blocks to either side that a query block keeps.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2407.17678, section 3.
    """

    name = "s2"

    stride: int = 8
    band: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("stride", self.stride)
        if isinstance(self.band, bool) or not isinstance(self.band, int) or self.band < 0:
            raise ValueError(f"band must be an int of at least 0, got {self.band!r}")

    @classmethod
    def exact(cls) -> S2:
        return cls(stride=1, warmup=0)

    def at_budget(self, share: float) -> S2:
        return replace(self, stride=max(1, round(1 / share)))

    def find(self, call: Call) -> PackedMask:
        # Layers whose shift is the same share one mask, if they have the same heads.
        masks = call.branch_shared.setdefault("masks", {})
        turn = call.layer % self.stride
        key = turn, call.heads.own
        if key not in masks:
            masks[key] = self.shards(call, turn)
        return masks[key]

    def shards(self, call: Call, turn: int) -> PackedMask:
        """The mask of layers whose shift is ``turn``."""
        device = call.q.device
        place = torch.arange(video_blocks(call.layout, self.block), device=device)
        step = max(1, self.stride // call.heads.total)
        shift = torch.tensor(call.heads.own, device=device) * step + turn
        shard = (place + shift[:, None]) % self.stride == 0
        band = (place[:, None] - place).abs() <= self.band
        return self.pack(call, (shard[:, None] | band)[None])
