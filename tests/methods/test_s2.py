"""S2: shards, their union, and the trap of the relative form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.s2 import S2


def keep(method: S2, data: Any, layer: int = 0) -> torch.Tensor:
    memory: dict[str, Any] = {}
    call = data.call(0, memory)
    call.layer = layer
    method.attend(call)
    return memory["mask"].dense()[0]


@pytest.mark.parametrize(("heads", "stride"), [(4, 4), (8, 4), (4, 3), (6, 6)])
def test_heads_together_cover_everything(make: Any, heads: int, stride: int) -> None:
    data = make(grid=(8, 8, 15), heads=heads)
    masks = keep(S2(stride, band=0, warmup=0), data)
    assert masks.any(0).all()
    # Heads read different shards, which the relative form does not give them.
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == min(heads, stride)


def test_few_heads_need_several_layers(make: Any) -> None:
    data, method = make(grid=(8, 8, 16), heads=2), S2(8, band=0, warmup=0)
    layers = [keep(method, data, layer) for layer in range(4)]
    assert not layers[0].any(0).all()
    assert torch.stack(layers).flatten(0, 1).any(0).all()


def test_a_head_is_a_band_and_every_vth_column(make: Any) -> None:
    data = make(grid=(8, 8, 16), heads=4)
    masks = keep(S2(4, band=1, warmup=0), data)
    place = torch.arange(16)
    band = (place[:, None] - place).abs() <= 1
    for head in range(4):
        assert torch.equal(masks[head], band | ((place + head) % 4 == 0))
    far = masks[:, ~band].double().mean()
    assert abs(float(far) - 1 / 4) < 0.02


def test_layers_of_one_shift_share_their_mask(make: Any) -> None:
    data, shared, masks = make(grid=(8, 8, 16), heads=2), {}, []
    for layer in range(6):
        memory: dict[str, Any] = {}
        call = data.call(0, memory)
        call.layer, call.shared = layer, shared
        S2(4, warmup=0).attend(call)
        masks.append(memory["mask"])
    assert masks[4] is masks[0] and masks[5] is masks[1]
    assert not torch.equal(masks[0].dense(), masks[1].dense())
