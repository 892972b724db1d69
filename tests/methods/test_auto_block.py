"""Methods with ``block="auto"`` compute what they compute with the block that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse import SparseConfig
from dit_sparse.mask import Block, block_sides
from dit_sparse.methods import auto_block
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Method
from dit_sparse.methods.compensated_delta import CompensatedDelta

METHODS = (AdaSpa(0.5, (1, 3)), CompensatedDelta(density=0.4, warmup=2, refresh="rows", period=2))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("block", [64, (128, 64)])
def test_auto_is_the_fastest_block(
    method: Method, block: Block, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [make(grid=(4, 8, 16), text=5, seed=seed) for seed in range(5)]
    monkeypatch.setattr(auto_block, "fastest_block", lambda q: block)
    found, memory, notes = [], {}, {}
    for index, each in enumerate(data):
        call = each.call(index, memory, 5)
        call.notes = notes
        found.append(method.attend(call))
    assert memory["mask"].block == block_sides(block)
    memory = {}
    named = type(method)(**{**vars(method), "block": block})
    wanted = [named.attend(each.call(index, memory, 5)) for index, each in enumerate(data)]
    assert all(map(torch.equal, found, wanted))
    assert ("blocks of 128 queries and 64 keys" in notes.get("blocks", "")) == (block != 64)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_auto_is_the_default_and_goes_through_json(method: Method) -> None:
    assert type(method)().block == "auto"  # type: ignore[attr-defined]
    assert SparseConfig.from_dict(SparseConfig(method).to_dict()).method == method


@pytest.mark.parametrize("kind", [AdaSpa, CompensatedDelta])
def test_other_words_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"block must be 64 or 128 .* 'fast'; .* 'auto'"):
        kind(block="fast")
