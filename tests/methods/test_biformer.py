"""BiFormer without weights: regions are tiles, and routing is exact for constant regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.biformer import BiFormer


@pytest.mark.parametrize("order", ["video_text", "text_video"])
def test_regions_of_constant_features_are_routed_by_their_exact_mass(make: Any, order: str) -> None:
    data = make(grid=(4, 8, 20), text=7, order=order, heads=3)
    perm = data.layout.ordering((4, 4, 4))
    for name in ("q", "k"):
        moved = perm.apply(getattr(data, name))
        # All tokens of a 4 x 4 x 4 box alike.
        first = moved[:, :640:64].repeat_interleave(64, 1)
        setattr(data, name, perm.undo(torch.cat([first, moved[:, 640:]], 1)))
    memory: dict[str, Any] = {}
    BiFormer(0.7, warmup=0).attend(data.call(0, memory))
    call = data.call().ordered(perm)
    mass = call.block_mass(call.row_lse(), 64)[..., :10, :10]
    mass.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    best = mass.argsort(-1, descending=True).argsort(-1) < 3
    assert torch.equal(memory["mask"].dense()[..., :10, :10], best)


def test_shared_routing_sums_over_heads(make: Any) -> None:
    data, memory, alone = make(heads=3), {}, {}
    method = BiFormer(0.5, per_head=False, warmup=0)
    out = method.attend(data.call(0, memory))
    assert memory["mask"].shape == (1, 1, 8, 8)
    # One head whose channels are those of all heads routes the same.
    wide = make(heads=1, dim=24)
    wide.q, wide.k, wide.v = (x.flatten(2).unsqueeze(2) for x in (data.q, data.k, data.v))
    BiFormer(0.5, warmup=0).attend(wide.call(0, alone))
    assert torch.equal(memory["mask"].dense(), alone["mask"].dense())
    keep = data.kept(memory["mask"], (4, 4, 4))
    assert (out - data.attention(keep)).abs().max() < 1e-10
