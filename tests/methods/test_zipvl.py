"""ZipVL without weights: how large the set of keys is."""

from __future__ import annotations

from typing import Any

import torch

from dit_sparse.methods.zipvl import ZipVL


def kept_columns(method: ZipVL, data: Any) -> torch.Tensor:
    """Key blocks that all query blocks keep, ``[batch, heads | 1, blocks]``."""
    memory: dict[str, Any] = {}
    method.attend(data.call(0, memory))
    keep = memory["mask"].dense()
    columns = keep.all(-2)
    own = torch.eye(keep.shape[-1], dtype=torch.bool)
    assert torch.equal(keep, columns.unsqueeze(-2) | own)
    return columns


def test_the_set_grows_with_tau_to_everything(make: Any) -> None:
    data = make(grid=(8, 8, 16), heads=3)
    counts = [
        int(kept_columns(ZipVL(tau, warmup=0), data).sum()) for tau in (0.0, 0.2, 0.5, 0.9, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 16
    assert counts[1] < counts[3]


def test_peaked_attention_gives_a_small_set(make: Any, plant: Any) -> None:
    wanted = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    wanted[..., 6] = True
    columns = kept_columns(ZipVL(0.9, warmup=0, tile=None), plant(wanted, grid=(8, 8, 16)))
    assert columns.nonzero()[:, -1].tolist() == [6]
    flat = make(grid=(8, 8, 16), sharp=0.0)
    assert int(kept_columns(ZipVL(0.9, warmup=0), flat).sum()) == 15


def test_the_set_is_of_the_layer_or_of_each_head(plant: Any) -> None:
    wanted = torch.zeros(2, 2, 16, 16, dtype=torch.bool)
    wanted[0, 0, :, 6] = wanted[0, 1, :, 9] = wanted[1, 0, :, 1] = wanted[1, 1, :, 2] = True
    data = plant(wanted, grid=(8, 8, 16))
    layer = kept_columns(ZipVL(0.9, warmup=0, tile=None), data)
    assert layer.nonzero().tolist() == [[0, 0, 6], [0, 0, 9], [1, 0, 1], [1, 0, 2]]
    heads = kept_columns(ZipVL(0.9, per_head=True, warmup=0, tile=None), data)
    assert heads.nonzero().tolist() == [[0, 0, 6], [0, 1, 9], [1, 0, 1], [1, 1, 2]]
