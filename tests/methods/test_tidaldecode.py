"""TidalDecode: anchors, reuse, and what happens where heads do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.tidaldecode import TidalDecode
from dit_sparse.schedule import Phase


def attend(method: TidalDecode, data: Any, layer: int, shared: dict, layers: int = 8) -> Any:
    """The mask of one layer at step 0, or None where the layer is dense."""
    memory: dict[str, Any] = {}
    call = data.call(0, memory)
    call.layer, call.layers, call.shared = layer, layers, shared
    method.attend(call)
    assert (call.phase is Phase.DENSE) is ("mask" not in memory)
    return memory.get("mask")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that searched."""
    found: list[int] = []
    original = TidalDecode.search

    def search(self: Any, call: Any) -> Any:
        found.append(call.layer)
        return original(self, call)

    monkeypatch.setattr(TidalDecode, "search", search)
    return found


def test_anchor_layers_search_and_others_reuse(make: Any, searches: list[int]) -> None:
    method, shared, data = TidalDecode(0.6, (2, 0.75), warmup=0), {}, make(heads=3)
    assert method.layers(8) == (2, 6)
    masks = [attend(method, data, layer, shared) for layer in range(8)]
    assert masks[0] is masks[1] is None
    assert searches == [2, 6]
    # The same operands: every layer has the same mask, and it is the exact one.
    call = data.call().ordered(data.call().tile_order((4, 4, 4)))
    mass = call.block_mass(call.row_lse(), 64)
    mass.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    best = mass.argsort(-1, descending=True).argsort(-1) < 3
    for mask in masks[2:]:
        assert torch.equal(mask.dense(), best)


def test_reused_masks_go_to_the_heads_they_fit(plant: Any, searches: list[int]) -> None:
    eye, index = torch.eye(8, dtype=torch.bool), torch.tensor([2, 0, 3, 1])
    data = plant(torch.stack([eye | eye.roll(s, 1) for s in (1, 2, 3, 4)])[None])
    for match in (True, False):
        shared: dict[str, Any] = {}
        method = TidalDecode(0.75, (0,), match, warmup=0, tile=None)
        anchor = attend(method, data, 0, shared).dense()
        reused = attend(method, data.heads(index), 1, shared)
        expected = anchor[:, index] if match else anchor
        assert torch.equal(reused.dense(), expected)
        torch.testing.assert_close(reused.head_density, expected.double().mean((-1, -2)).float())
    assert searches == [0, 0]


@pytest.mark.parametrize("match", [True, False])
def test_a_layer_whose_heads_fit_nothing_searches(
    make: Any, plant: Any, searches: list[int], match: bool
) -> None:
    eye = torch.eye(8, dtype=torch.bool)
    first = torch.stack([eye | eye.roll(s, 1) for s in (1, 2)])[None]
    shuffled, other = first.flip(1), torch.stack([eye | eye.roll(s, 1) for s in (3, 4)])[None]
    shared: dict[str, Any] = {}
    method = TidalDecode(0.75, (0,), match, 0.9, warmup=0, tile=None)
    attend(method, plant(first), 0, shared)
    assert torch.equal(attend(method, plant(shuffled), 1, shared).dense(), shuffled)
    assert searches == ([0] if match else [0, 1])
    # What layer 2 finds for itself serves the layers after it.
    assert torch.equal(attend(method, plant(other), 2, shared).dense(), other)
    assert torch.equal(attend(method, plant(other), 3, shared).dense(), other)
    assert searches == ([0, 2] if match else [0, 1, 2])


def test_a_skipped_anchor_is_made_up_for(make: Any, searches: list[int]) -> None:
    method, shared = TidalDecode(0.6, (2,), warmup=0), {}
    assert attend(method, make(), 5, shared) is not None
    attend(method, make(), 6, shared)
    assert searches == [5]


def test_anchors_of_shallow_models() -> None:
    assert TidalDecode().layers(40) == (2, 16)
    assert TidalDecode().layers(7) == (2, 3)
    assert TidalDecode().layers(1) == (0,)
    assert TidalDecode(anchors=(1.0,)).layers(5) == (4,)
