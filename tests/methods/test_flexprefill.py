"""FlexPrefill without weights: the budget, the distance and the two patterns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.estimates import probe_mass, probe_rows
from dit_sparse.methods.flexprefill import FlexPrefill


def method(gamma: float = 0.9, tau: float = 0.1, **more: Any) -> FlexPrefill:
    options = {"probes": 64, "least": 64, "block": 64, "warmup": 0, **more}
    return FlexPrefill(gamma, tau, **options)


def density(one: FlexPrefill, data: Any) -> torch.Tensor:
    call = data.call(0)
    one.attend(call)
    return call.head_density[0]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_density_rises_with_gamma_in_either_pattern(make: Any, tau: float) -> None:
    data = make(grid=(8, 8, 16), heads=3)
    found = torch.stack([density(method(g, tau), data) for g in (0.1, 0.5, 0.9, 0.99, 1.0)])
    assert (found.diff(dim=0) >= 0).all()
    assert (found[0] < 0.6).all()
    assert (found[-1] == 1).all()
    assert (found[1] < found[3]).all()


def distance(one: FlexPrefill, data: Any) -> torch.Tensor:
    call = data.call()
    rows = probe_rows(call, one.probes, one.block)
    blocks = -(-data.layout.video // one.block)
    return one.distance(call, rows, probe_mass(call, rows, one.block)[..., :blocks])


def test_an_exact_estimate_has_distance_zero(make: Any) -> None:
    # The last block is ragged: its estimate must count its tokens.
    data = make(grid=(3, 10, 15), heads=3)
    place = torch.arange(450) // 64
    data.k = data.k[:, place * 64]
    data.q[:] = data.q[:, :1]
    assert distance(method(), data).max() < 1e-7
    # Queries that look elsewhere make the mean query a poor witness.
    spread = make(grid=(3, 10, 15), heads=3, sharp=9.0)
    assert distance(method(), spread).min() > 0.1


def test_the_distance_is_that_of_jensen_and_shannon(make: Any) -> None:
    from scipy.spatial.distance import jensenshannon

    data, one = make(grid=(4, 8, 16)), method()
    rows = probe_rows(data.call(), 64, 64)
    true = data.softmax()[0, :, rows].view(2, 64, 8, 64).sum(-1).mean(1)
    query, keys = data.q[0, rows].mean(0), data.k[0].view(8, 64, 2, 8).mean(1)
    guess = (torch.einsum("hd,bhd->hb", query, keys) * 8**-0.5).softmax(-1)
    expected = [jensenshannon(a, b) for a, b in zip(true.numpy(), guess.numpy(), strict=True)]
    torch.testing.assert_close(distance(one, data)[0], torch.tensor(expected).double())


def test_each_head_takes_the_pattern_of_its_distance(make: Any) -> None:
    data = make(grid=(4, 8, 16), heads=2, sharp=9.0)
    place = torch.arange(512) // 64
    data.q[:, :, 0] = data.q[:, :1, 0]
    data.k[:, :, 0] = data.k[:, place * 64, 0]
    found = distance(method(), data)[0]
    assert found[0] < 0.1 < found[1]
    masks: dict[float, torch.Tensor] = {}
    for tau in (0.0, 0.1, 1.0):
        memory: dict[str, Any] = {}
        method(0.6, tau).attend(data.call(0, memory))
        masks[tau] = memory["mask"].dense()[0]
    assert torch.equal(masks[0.1][0], masks[1.0][0])
    assert torch.equal(masks[0.1][1], masks[0.0][1])
    assert not torch.equal(masks[0.0][1], masks[1.0][1])


def test_a_query_aware_budget_is_global_over_the_rows_of_a_head(make: Any) -> None:
    data, memory = make(grid=(4, 8, 16), heads=1), {}
    # The first half of the rows looks at one block, the second half everywhere.
    place = torch.arange(512) // 64
    axes = torch.eye(8).double()
    data.k = axes[place][None, :, None]
    data.q = torch.where(place < 4, 60.0, 0.1)[None, :, None, None] * axes[place][None, :, None]
    method(0.8, 1.0).attend(data.call(0, memory))
    counts = memory["mask"].dense()[0, 0].sum(-1)
    assert (counts[:4] == 1).all()
    # 0.8 of 8 rows: 4 rows in a block each, and 2.4 of 4 rows of eight even blocks. Chosen row by
    # row it would be 7 in each of these.
    assert counts[4:].sum() == 20


def test_rows_keep_the_least_number_of_tokens(make: Any) -> None:
    data, memory = make(grid=(8, 8, 16), heads=2, sharp=30.0), {}
    method(0.0, 1.0, least=300).attend(data.call(0, memory))
    assert memory["mask"].dense().sum(-1).min() == 5
