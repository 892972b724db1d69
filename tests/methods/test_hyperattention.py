"""HyperAttention without weights: hashes, neighbourhoods, and a residual without bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.hyperattention import HyperAttention, gray_rank, random_directions

CPU = torch.device("cpu")


def test_patterns_of_neighbouring_ranks_differ_in_one_sign() -> None:
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
    rank = gray_rank(patterns)
    assert rank.sort().values.tolist() == list(range(32))
    ordered = patterns[rank.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(-1) == 1).all()


def test_directions_are_those_of_the_seed() -> None:
    first = random_directions(8, 7, 3, CPU)
    assert first.shape == (8, 7)
    assert torch.equal(first, random_directions(8, 7, 3, CPU))
    assert not torch.equal(first, random_directions(8, 7, 4, CPU))


def clusters(make: Any, scattered: bool) -> tuple[Any, torch.Tensor]:
    """Eight groups of 64 tokens with the same query and key each, and the group of every token."""
    data = make(grid=(4, 8, 16), heads=2, dim=16)
    rng = torch.Generator().manual_seed(5)
    group = torch.arange(512) // 64
    if scattered:
        group = group[torch.randperm(512, generator=rng)]
    centres = torch.randn(8, 2, 16, generator=rng).double()
    data.q[0] = data.k[0] = centres[group]
    return data, group


def test_equal_queries_and_keys_land_in_one_block(make: Any) -> None:
    data, group = clusters(make, scattered=True)
    data.v = torch.zeros_like(data.v)
    data.v[0, torch.arange(512), :, group] = 1.0
    method = HyperAttention(7 / 8, bits=16, sample=False, warmup=0)
    out = method.attend(data.call(0))
    # One block a row: a token sees its own group alone, wherever the group is scattered.
    assert (out[0, torch.arange(512), :, group] - 1).abs().max() < 1e-12


def test_what_all_tokens_share_does_not_hide_who_is_alike(make: Any) -> None:
    data, group = clusters(make, scattered=True)
    # A bias on all keys changes no softmax; one on queries and keys would fix most signs.
    data.q, data.k = data.q + 20, data.k - 20
    data.v = torch.zeros_like(data.v)
    data.v[0, torch.arange(512), :, group] = 1.0
    out = HyperAttention(7 / 8, bits=16, sample=False, warmup=0).attend(data.call(0))
    assert (out[0, torch.arange(512), :, group] - 1).abs().max() < 1e-12


def lse(method: HyperAttention, data: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of all rows, in the order of the sorted queries."""
    from dit_sparse.methods.base import Call

    found = []
    original = Call.attention

    def attention(call: Any, *args: Any) -> Any:
        found.append(original(call, *args))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Call, "attention", attention)
        method.attend(data.call(0))
    return found[-1].lse


def test_the_estimated_denominator_is_right_on_average(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(grid=(2, 8, 18), heads=1, text=5, sharp=1.0)  # 288 tokens: a ragged block
    estimates = []
    for seed in range(300):
        # Every seed draws other directions too: put rows back by the sum, which no order changes.
        estimates.append(lse(HyperAttention(0.6, seed=seed, warmup=0), data, monkeypatch).exp())
    total = torch.stack([e[0, 0].sum() for e in estimates])
    true = data.call().row_lse().exp().sum()
    error = total.std() / len(total) ** 0.5
    assert (total.mean() - true).abs() < 3 * error
    assert error < 0.01 * true
    # Dropping what is not kept is off by far more.
    dropped = lse(HyperAttention(0.6, sample=False, warmup=0), data, monkeypatch).exp().sum()
    assert true - dropped > 20 * error


@pytest.mark.parametrize("text", [0, 5])
def test_nothing_counts_twice(make: Any, text: int) -> None:
    # Keys alike inside every sorted block: any draw stands for its block exactly, so the result is
    # dense attention unless a key enters both in full and by its sample.
    data, _ = clusters(make, scattered=False)
    values = data.v[:, ::64].repeat_interleave(64, 1)
    data.v = values
    if text:
        longer = make(grid=(4, 8, 16), heads=2, dim=16, text=text)
        for name in ("q", "k", "v"):
            getattr(longer, name)[:, :512] = getattr(data, name)
        data = longer
    method = HyperAttention(0.6, bits=16, tile=None, warmup=0)
    out = method.attend(data.call(0))
    assert (out - data.attention()).abs().max() < 1e-10
    dropped = HyperAttention(0.6, bits=16, tile=None, sample=False, warmup=0)
    assert (dropped.attend(data.call(0)) - data.attention()).abs().max() > 1e-3


def test_draws_are_of_their_block_and_change_with_the_step(make: Any) -> None:
    data = make(grid=(2, 8, 18), heads=2, text=5, batch=2)
    data.key_valid = torch.ones(2, 293, dtype=torch.bool)
    data.key_valid[1, 150:288] = False
    data.k[1, 150:288] = data.v[1, 150:288] = float("nan")
    method = HyperAttention(0.6)
    drawn = [method.draw(data.call(index)) for index in (3, 3, 4)]
    # 288 video tokens: four blocks, and one shared with text, which stands for nothing.
    assert drawn[0].count.tolist() == [[64, 64, 64, 64, 0], [64, 64, 22, 0, 0]]
    assert torch.equal(drawn[0].key_mean, drawn[1].key_mean)
    assert not torch.equal(drawn[0].key_mean, drawn[2].key_mean)
    for block in range(4):
        for head in range(2):
            matches = (data.k[0, :, head] == drawn[0].key_mean[0, block, head]).all(-1)
            (place,) = matches.nonzero()[:, 0].tolist()
            assert place // 64 == block
            assert torch.equal(data.v[0, place, head], drawn[0].value_mean[0, block, head])
    assert drawn[0].key_mean.isfinite().all()
    assert (drawn[0].key_mean[1, 3:] == 0).all()
