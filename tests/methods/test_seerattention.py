"""SeerAttention without trained gates: the features, the gate, and the file it is read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dit_sparse.methods.biformer import BiFormer
from dit_sparse.methods.seerattention import SeerAttention, gate_features, identity_gate


def mask(method: Any, data: Any, layer: int = 0, layers: int = 1) -> torch.Tensor:
    memory: dict[str, Any] = {}
    call = data.call(0, memory)
    call.layer, call.layers = layer, layers
    method.attend(call)
    return memory["mask"].dense()


def saved(path: Path, query: torch.Tensor, key: torch.Tensor) -> str:
    save_file({"query": query.contiguous(), "key": key.contiguous()}, path)
    return str(path)


def test_the_identity_gate_is_pooled_selection(make: Any, tmp_path: Path) -> None:
    data = make(grid=(4, 8, 20), text=5, heads=3)
    pooled = mask(BiFormer(0.7, warmup=0), data)
    assert torch.equal(mask(SeerAttention(0.7, warmup=0), data), pooled)
    path = saved(tmp_path / "gate.safetensors", *identity_gate(1, 3, 8))
    assert torch.equal(mask(SeerAttention(0.7, path, warmup=0), data), pooled)


def test_features_are_mean_maximum_and_minimum_of_what_exists(make: Any) -> None:
    data = make(grid=(3, 10, 15), batch=2)
    data.key_valid = torch.ones(2, 450, dtype=torch.bool)
    data.key_valid[0, 64:128] = False
    data.key_valid[1, 440:] = False
    data.k[~data.key_valid] = float("nan")
    queries, keys, there = gate_features(data.call(), 64)
    assert queries.shape == (2, 2, 8, 8)
    assert keys.shape == (2, 2, 8, 24)
    assert there.int().tolist() == [[1, 0] + [1] * 6, [1] * 7 + [0]]
    block = data.k[1, 384:440]
    expected = torch.cat([block.amax(0), block.amin(0), block.mean(0)], -1)
    torch.testing.assert_close(keys[1, :, 6], expected)
    assert (keys[0, :, 1] == 0).all()
    assert keys.isfinite().all()


def test_the_gate_of_each_layer_and_head_is_used(make: Any, tmp_path: Path) -> None:
    data = make(grid=(4, 8, 20), heads=2, dim=8)
    rng = torch.Generator().manual_seed(0)
    query, key = torch.randn(3, 2, 8, 5, generator=rng), torch.randn(3, 2, 24, 5, generator=rng)
    path = saved(tmp_path / "gate.safetensors", query, key)
    queries, keys, _ = gate_features(data.call().ordered(data.call().tile_order((4, 4, 4))), 64)
    found = []
    for layer in range(3):
        logits = (queries @ query[layer].double()) @ (keys @ key[layer].double()).mT
        logits.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        expected = logits.argsort(-1, descending=True).argsort(-1) < 3
        found.append(mask(SeerAttention(0.7, path, warmup=0), data, layer, 3))
        assert torch.equal(found[-1], expected)
    assert not torch.equal(found[0], found[1])


def test_gates_that_do_not_fit_are_refused(make: Any, tmp_path: Path) -> None:
    data = make(heads=2, dim=8)
    path = saved(tmp_path / "gate.safetensors", *identity_gate(2, 2, 8))
    with pytest.raises(ValueError, match=r"\(2, 2, 8\), this model has \(1, 2, 8\)"):
        mask(SeerAttention(0.5, path, warmup=0), data)
    with pytest.raises(FileNotFoundError, match="absent"):
        mask(SeerAttention(0.5, str(tmp_path / "absent"), warmup=0), data)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="'query' and 'key'"):
        mask(SeerAttention(0.5, str(other), warmup=0), data)
