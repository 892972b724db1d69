"""ZipVL: one set of important keys a layer, as large as the attention asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import probe_mass, probe_rows, top_share
from dit_sparse.methods.scored import BlockSearched, Tiled, check_count, check_share


@dataclass(frozen=True)
class ZipVL(Tiled, BlockSearched):
    """All queries attend to the fewest key blocks that hold the share tau of the attention.

    With A the attention of probe queries, ``a_c = sum_i A[i, c]`` ranks key blocks, and the set is
    the shortest prefix with ``sum a_c >= tau * total``. Every query block also keeps its own place.

    The paper applies this to tokens and drops unimportant ones as queries too; every video token
    needs an output, so here they are only left out as keys. It probes with recent and random
    tokens; here probes are spread over the video.

    Attributes:
        tau: Share of the attention to keep, in (0, 1]; 1 keeps everything.
        probes: Queries that are attended in full.
        per_head: Whether each head has its own set; False is one for the layer, as in the paper.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2410.08584, section 4.
    """

    name = "zipvl"

    tau: float = 0.9
    probes: int = 64
    per_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("tau", self.tau, least=0)
        check_count("probes", self.probes)

    @classmethod
    def exact(cls) -> ZipVL:
        return cls(tau=1.0, warmup=0)

    def at_budget(self, share: float) -> ZipVL:
        return replace(self, tau=share)

    def find(self, call: Call) -> PackedMask:
        blocks = video_blocks(call.layout, self.block)
        rows = probe_rows(call, self.probes, self.block)
        mass = probe_mass(call, rows, self.block)[..., :blocks].sum(-2)
        if not self.per_head:
            mass = call.heads.all_heads(mass).sum(1, keepdim=True)
        own = torch.eye(blocks, dtype=torch.bool, device=mass.device)
        return self.pack(call, top_share(mass, self.tau)[..., None, :] | own)
