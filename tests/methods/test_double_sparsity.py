"""Double Sparsity without weights: which channels, and what they find."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.double_sparsity import DoubleSparsity


def scores(method: DoubleSparsity, data: Any) -> torch.Tensor:
    return method.scores(data.call().ordered(data.call().tile_order(method.tile)))


def exact(data: Any) -> torch.Tensor:
    call = data.call().ordered(data.call().tile_order((4, 4, 4)))
    return call.block_mass(call.row_lse(), 64)


def test_all_channels_score_exactly(make: Any) -> None:
    data = make(dim=16)
    torch.testing.assert_close(scores(DoubleSparsity(channels=16), data), exact(data))
    # More than there are is all of them.
    torch.testing.assert_close(scores(DoubleSparsity(channels=64), data), exact(data))


@pytest.mark.parametrize("rotary", ["interleaved", "halves", None])
def test_energy_in_few_channels_ranks_exactly(make: Any, rotary: Any) -> None:
    data = make(dim=16, heads=3)
    heavy = {"interleaved": [4, 5, 10, 11], "halves": [2, 5, 10, 13], None: [0, 3, 8, 14]}[rotary]
    light = [c for c in range(16) if c not in heavy]
    data.q[..., light] = 0
    method = DoubleSparsity(0.6, channels=4, rotary=rotary)
    assert method.heaviest(data.call()).tolist() == [[heavy] * 3]
    torch.testing.assert_close(scores(method, data), exact(data))
    # With fewer channels than carry the scores something is missed.
    assert not torch.allclose(
        scores(DoubleSparsity(0.6, channels=2, rotary=rotary), data), exact(data)
    )


def test_channels_weigh_by_queries_times_keys_of_each_head(make: Any) -> None:
    data = make(dim=8, heads=2, batch=2, sharp=1.0)
    # Large queries against no keys weigh nothing.
    data.q[:, :, 0, 0:2] *= 100
    data.k[:, :, 0, 0:2] = 0
    data.q[:, :, 0, 6:8] *= 5
    data.k[1, :, 1, 4:6] *= 7
    chosen = DoubleSparsity(channels=2).heaviest(data.call())
    assert chosen[:, 0].tolist() == [[6, 7]] * 2
    assert chosen[1, 1].tolist() == [4, 5]
    weight = (data.q[0, :, 1, :, None].abs() * data.k[0, :, 1].abs().mean(0)[None, :, None]).mean(0)
    pairs = weight.flatten().view(4, 2).sum(-1)
    assert chosen[0, 1, 0] == 2 * int(pairs.argmax())


def test_a_pair_of_channels_is_ranked_as_one(make: Any) -> None:
    data = make(dim=8, heads=1, sharp=1.0)
    weight = torch.tensor([9.0, 1.0, 7.0, 6.0, 0.0, 0.0, 5.0, 0.0]).double()
    data.q[:], data.k[:] = weight, 1.0
    assert DoubleSparsity(channels=2).heaviest(data.call()).tolist() == [[[2, 3]]]
    assert DoubleSparsity(channels=2, rotary="halves").heaviest(data.call()).tolist() == [[[2, 6]]]
    assert DoubleSparsity(channels=2, rotary=None).heaviest(data.call()).tolist() == [[[0, 2]]]


def test_channels_are_chosen_once_a_generation(make: Any) -> None:
    method, memory = DoubleSparsity(0.6, channels=4, warmup=0), {}
    method.attend(make(dim=16).call(0, memory))
    first = memory["channels"]
    method.attend(make(dim=16, seed=1).call(1, memory))
    assert memory["channels"] is first
    assert not torch.equal(method.heaviest(make(dim=16, seed=1).call()), first)
