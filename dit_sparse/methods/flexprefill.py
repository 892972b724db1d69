"""FlexPrefill: every head takes the blocks that hold a given share of its attention.

Source: arXiv 2502.20766, section 3 and algorithms 1-4, without the causal mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import (
    block_means,
    pooled_scores,
    probe_mass,
    probe_rows,
    rank_of,
    scale_of,
    top_share,
)
from dit_sparse.methods.minference import line_mass, offsets
from dit_sparse.methods.scored import BlockSearched, Tiled, check_count, check_share


@dataclass(frozen=True)
class FlexPrefill(Tiled, BlockSearched):
    """A budget per head by cumulative attention, and one of two patterns by how far pooling errs.

    Let a be the attention of probe queries summed over key blocks and
    ``a' = softmax(mean(q) . kbar)`` its estimate from means, both over video blocks. A head with
    ``sqrt(JS(a, a')) < tau`` is *query-aware*: of the pooled map ``softmax(qbar_p . kbar_c)`` it
    keeps the largest entries, over all rows together, that hold the share gamma. Any other head is
    *vertical-slash*: it keeps the fewest columns and the fewest diagonals that each hold the share
    gamma of the probes' attention. JS is in natural logarithms.

    The paper probes with the last block of queries; here probes are spread over the video. The main
    diagonal is forced, the paper's first column (an attention sink of language models) is not.

    Attributes:
        gamma: Share of attention to keep, in (0, 1]; 1 keeps everything.
        tau: Largest distance at which the pooled map is trusted.
        probes: Queries that are attended in full.
        least: Tokens that a row keeps at least.

    Raises:
        ValueError: On a value outside these ranges.
    """

    name = "flexprefill"

    gamma: float = 0.9
    tau: float = 0.1
    probes: int = 128
    least: int = 512
    tile: tuple[int, int, int] | None = field(default=None, kw_only=True)
    block: int = field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("gamma", self.gamma, least=0)
        check_share("tau", self.tau, least=0)
        check_count("probes", self.probes)
        check_count("least", self.least)

    @classmethod
    def exact(cls) -> FlexPrefill:
        return cls(gamma=1.0, warmup=0)

    def at_budget(self, share: float) -> FlexPrefill:
        return replace(self, gamma=share)

    def find(self, call: Call) -> PackedMask:
        blocks = video_blocks(call.layout, self.block)
        rows = probe_rows(call, self.probes, self.block)
        mass = probe_mass(call, rows, self.block)[..., :blocks]
        pooled = pooled_scores(call, self.block)
        trusted = self.distance(call, rows, mass) < self.tau
        keep = torch.where(
            trusted[..., None, None],
            self._query_aware(pooled),
            self._vertical_slash(mass, rows // self.block, offsets(blocks, call)),
        )
        keep |= torch.eye(blocks, dtype=torch.bool, device=keep.device)
        keep |= rank_of(pooled) < -(-self.least // self.block)
        return self.pack(call, keep)

    def distance(self, call: Call, rows: Tensor, mass: Tensor) -> Tensor:
        """Jensen-Shannon distance of a and a', ``[batch, heads]``.

        Args:
            call: Tokens ordered video first.
            rows: Positions of the probes.
            mass: Their attention to video blocks, ``[batch, heads, probes, blocks]``.
        """
        tokens = min(mass.shape[-1] * self.block, call.layout.video)
        keys_valid = rows_valid = None
        if call.key_valid is not None:
            keys_valid, rows_valid = call.key_valid[:, :tokens], call.key_valid[:, rows]
        query, _ = block_means(call.q[:, rows], len(rows), rows_valid)
        keys, count = block_means(call.k[:, :tokens], self.block, keys_valid)
        guess = scale_of(call) * (query @ keys.mT)[:, :, 0]
        # A block of fewer tokens holds less of the attention.
        guess = (guess + count.log()[:, None]).softmax(-1)
        true = mass.sum(-2)
        true = true / true.sum(-1, keepdim=True).clamp_min(1e-30)
        middle = (guess + true) / 2
        each = torch.stack([guess, true])
        divergence = torch.xlogy(each, each / middle.clamp_min(1e-30)).sum((0, -1)) / 2
        return divergence.clamp_min(0).sqrt()

    def _query_aware(self, pooled: Tensor) -> Tensor:
        attention = pooled.softmax(-1)
        return top_share(attention.flatten(-2), self.gamma).view_as(attention)

    def _vertical_slash(self, mass: Tensor, rows: Tensor, place: Tensor) -> Tensor:
        vertical, slash = (top_share(lines, self.gamma) for lines in line_mass(mass, rows))
        return vertical[..., None, :] | slash[..., place]
