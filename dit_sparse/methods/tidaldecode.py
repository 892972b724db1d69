"""TidalDecode: a few layers search, the others reuse what they found."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import best_blocks, kept_count, probe_mass, probe_rows, video_mass
from dit_sparse.methods.scored import BlockSearched, Tiled, check_share
from dit_sparse.schedule import Phase

# Queries by which a layer that reuses masks tells which of them fits which head.
_PROBES = 64


@dataclass(frozen=True)
class TidalDecode(Tiled, BlockSearched):
    """Exact block search in anchor layers; the layers between take over the nearest one before.

    An anchor keeps, in every row, the ``round((1 - sparsity) N)`` video blocks of largest attention
    mass, at the price of two passes over queries and keys. The paper lets layer 2 and one layer in
    the middle select tokens, keeps the layers before the first dense, and reuses positions head by
    head in one decoding step; here positions also serve ``every`` steps.

    Heads of two layers have nothing to do with each other, so a layer that reuses gives each of its
    heads the mask, out of all heads of the anchor, that holds most of the attention of a few probe
    queries. Where even that holds too little the layer can search for itself.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1).
        anchors: Layers that search, ascending: indices (int) or shares of the depth (float).
        match_heads: Whether reused masks are matched to heads; False takes them head by head.
        min_recall: A head's reused mask must hold at least this share of the attention that the
            best one of its size would, or its layer searches. The check waits for the device once a
            search. None trusts every mask, as in the paper.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2410.05076, section 3.2 and algorithm 1.
    """

    name = "tidaldecode"
    # A head may take over the mask of any other.
    splits_heads = False

    sparsity: float = 0.8
    anchors: tuple[int | float, ...] = (2, 0.4)
    match_heads: bool = True
    min_recall: float | None = None
    every: int = field(default=10, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity, least=0, below=1)
        if not self.anchors:
            raise ValueError("anchors must name at least one layer, got ()")
        for anchor in self.anchors:
            if isinstance(anchor, float):
                check_share("an anchor given as a share", anchor, least=0)
            elif isinstance(anchor, bool) or not isinstance(anchor, int) or anchor < 0:
                raise ValueError(f"an anchor must be an int >= 0 or a share, got {anchor!r}")
        if self.min_recall is not None:
            check_share("min_recall", self.min_recall, least=0)

    @classmethod
    def exact(cls) -> TidalDecode:
        return cls(sparsity=0.0, anchors=(0,), warmup=0)

    def layers(self, total: int) -> tuple[int, ...]:
        """The anchor layers of a model of ``total`` layers."""
        named = [round(a * total) if isinstance(a, float) else a for a in self.anchors]
        return tuple(sorted({min(index, total - 1) for index in named}))

    def attend(self, call: Call) -> Tensor:
        if call.layer < self.layers(call.layers)[0]:
            call.record(Phase.DENSE)
            return call.dense()
        return super().attend(call)

    def find(self, call: Call) -> PackedMask:
        found = call.branch_shared.get("mask")
        # A step cache may have skipped the anchor.
        if found is not None and call.layer not in self.layers(call.layers):
            reused = self._reuse(call, found)
            if reused is not None:
                return reused
        call.branch_shared["mask"] = self.search(call)
        return call.branch_shared["mask"]

    def search(self, call: Call) -> PackedMask:
        """The mask of this layer's own attention mass."""
        mass = video_mass(call, call.q, call.k, self.block)
        return best_blocks(call, mass, self.sparsity, self.block)

    def _reuse(self, call: Call, found: PackedMask) -> PackedMask | None:
        """The anchor's masks, matched to heads; None where one of them is not good enough."""
        blocks = video_blocks(call.layout, self.block)
        if not (self.match_heads or self.min_recall is not None):
            return found
        rows = probe_rows(call, _PROBES, self.block)
        mass = probe_mass(call, rows, self.block)[..., :blocks]
        keep = found.dense()[:, :, rows // self.block, :blocks]
        held = torch.einsum("bhrc,bgrc->bhg", mass, keep.to(mass.dtype))
        head = held.argmax(-1)
        if not self.match_heads:
            head = torch.arange(held.shape[1], device=held.device).expand_as(head)
        if self.min_recall is not None:
            best = mass.topk(kept_count(self.sparsity, blocks), -1).values.sum((-1, -2))
            share = held.gather(-1, head[..., None])[..., 0] / best.clamp_min(1e-30)
            if bool((share < self.min_recall).any()):
                return None
        if not self.match_heads:
            return found
        batch = torch.arange(len(head), device=head.device)[:, None]
        return PackedMask(
            found.bits[batch, head],
            found.longest,
            found.head_density[batch, head],
            found.block,
            found.seq,
        )
