"""BiFormer: routing between regions, here boxes in space and time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_sparse.methods.base import Call
from dit_sparse.methods.estimates import as_mass, pooled_scores
from dit_sparse.methods.scored import BlockScored


@dataclass(frozen=True)
class BiFormer(BlockScored):
    """Tokens of a region attend to the regions that are nearest by mean query and mean key.

    ``A_r = Q_r K_r^T`` over region means, then dense attention inside the union of the top-k
    regions of each region. The paper's regions are windows of an image, the same k regions for all
    heads; here a region is one tile of the video, a run of ``block`` tokens in tile order, so a
    tile should hold ``block`` tokens. Its depth-wise convolution branch is trained and left out.

    Attributes:
        sparsity: Share of regions that a region skips, in [0, 1).
        per_head: Whether every head routes on its own; False sums the routing over heads, as in the
            paper, where A_r is taken over all channels.

    Source: arXiv 2303.08810, section 3.2.
    """

    name = "biformer"

    per_head: bool = True

    def scores(self, call: Call) -> Tensor:
        scores = pooled_scores(call, self.block)
        return as_mass(scores if self.per_head else scores.sum(1, keepdim=True))
