"""MInference 1.0: pooled block selection, and vertical-slash lines, without a causal mask.

Source: arXiv 2407.02490, section 3.2 and algorithms 2 and 3. Its A-shape is a static window. The
paper assigns one pattern to every head in an offline search; here each is a method of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import as_mass, pooled_scores, probe_mass, probe_rows
from dit_sparse.methods.scored import BlockScored, BlockSearched, Tiled, check_count, check_share


@dataclass(frozen=True)
class MInferenceBlock(BlockScored):
    """Top-k key blocks of every query block by the product of mean query and mean key.

    ``score[p, c] = qbar_p . kbar_c / sqrt(d)`` with means over the tokens of a block.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1).

    Source: arXiv 2407.02490, algorithm 3 (block-sparse heads).
    """

    name = "minference_block"
    # Runs of raster order, as in the paper.
    tile: tuple[int, int, int] | None = field(default=None, kw_only=True)

    def scores(self, call: Call) -> Tensor:
        return as_mass(pooled_scores(call, self.block))


@dataclass(frozen=True)
class MInferenceVS(Tiled, BlockSearched):
    """Whole columns and diagonals of the attention map, found from a few queries.

    With A the attention of probe queries, ``vertical_c = mean_i A[i, c]`` and
    ``slash_o = mean_i A[i, p(i) - o]`` over key blocks c and block offsets o of either sign. Lines
    are taken by falling mean mass of their blocks, the main diagonal first, until the budget is
    full; the mask is their union.

    The paper probes with the last 64 queries and fixes the number of columns and diagonals of each
    head offline; here the probes are spread over the video and one budget is shared by both kinds
    of lines. Its forced first columns are the attention sink of language models and are left out.

    Attributes:
        sparsity: Share of video blocks that a head skips, in [0, 1).
        probes: Queries that are attended in full to find the lines.

    Source: arXiv 2407.02490, algorithm 2 (vertical-slash heads).
    """

    name = "minference_vs"

    sparsity: float = 0.8
    probes: int = 64
    tile: tuple[int, int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity, least=0, below=1)
        check_count("probes", self.probes)

    @classmethod
    def exact(cls) -> MInferenceVS:
        return cls(sparsity=0.0, warmup=0)

    def find(self, call: Call) -> PackedMask:
        blocks = video_blocks(call.layout, self.block)
        rows = probe_rows(call, self.probes, self.block)
        mass = probe_mass(call, rows, self.block)[..., :blocks]
        vertical, slash = line_mass(mass, rows // self.block)
        # Per block of the line. A diagonal that no probe crosses is not known to hold anything.
        crossing = line_mass(torch.ones_like(mass[:1, :1]), rows // self.block)[1]
        slash = slash / crossing.clamp(min=1)
        slash[..., blocks - 1] = float("inf")
        lines = torch.cat([vertical / len(rows), slash], -1)
        place = lines.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        # The place in the queue of the first line that covers a block.
        first = torch.minimum(place[..., None, :blocks], place[..., blocks + offsets(blocks, call)])
        # What the first lines in the queue cover together, and how many of them fill the budget.
        covers = torch.zeros_like(place).scatter_add_(
            -1, first.flatten(-2), torch.ones_like(first).flatten(-2)
        )
        budget = round((1 - self.sparsity) * blocks * blocks)
        needed = (covers.cumsum(-1) < budget).sum(-1)
        return self.pack(call, first <= needed[..., None, None])


def offsets(blocks: int, call: Call) -> Tensor:
    """``p - c + blocks - 1``: the diagonal of every block, ``[blocks, blocks]`` int64."""
    place = torch.arange(blocks, device=call.q.device)
    return place[:, None] - place + blocks - 1


def line_mass(mass: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of probe queries summed along columns and along diagonals of blocks.

    Args:
        mass: ``[batch, heads, probes, blocks]``.
        rows: Query block of every probe, ``[probes]``.

    Returns:
        Columns ``[batch, heads, blocks]`` and diagonals ``[batch, heads, 2 blocks - 1]``, of which
        number ``p - c + blocks - 1`` holds key block c of query block p.
    """
    blocks = mass.shape[-1]
    place = rows[:, None] - torch.arange(blocks, device=mass.device) + blocks - 1
    slash = mass.new_zeros(*mass.shape[:2], 2 * blocks - 1)
    slash.index_add_(-1, place.flatten(), mass.flatten(-2))
    return mass.sum(-2), slash
