"""Orders of tokens by head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.head_order import HeadOrder, regroup


def test_tokens_are_sorted_by_key_in_every_head_with_padding_last(make: Any) -> None:
    data = make(grid=(2, 3, 5), text=4, batch=2, heads=3)
    data.key_valid = torch.ones(2, 34, dtype=torch.bool)
    data.key_valid[1, 10:16] = False
    data.key_valid[1, 32:] = False
    rng = torch.Generator().manual_seed(0)
    key = torch.randint(0, 4, (2, 3, 30), generator=rng)
    order = HeadOrder.by(key, data.call())
    assert order.perm.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            perm = order.perm[b, h].long()
            assert torch.equal(perm.sort().values, torch.arange(34))
            assert torch.equal(perm[30:], torch.arange(30, 34))
            there = int(data.key_valid[b, :30].sum())
            assert data.key_valid[b, perm[:there]].all()
            ordered = key[b, h, perm[:there]]
            assert (ordered.diff() >= 0).all()
            # Equal keys keep their order.
            assert (perm[:there].diff()[ordered.diff() == 0] > 0).all()
            moved = order.apply(data.q)
            assert torch.equal(moved[b, :, h], data.q[b, perm, h])
    assert torch.equal(order.undo(order.apply(data.q)), data.q)
    moved = regroup(data.call(), order, order)
    for b in range(2):
        for h in range(3):
            expected = data.key_valid[b, order.perm[b, h].long()]
            assert torch.equal(moved.key_valid[b], expected)


def test_dense_attention_does_not_feel_two_orders(make: Any) -> None:
    data = make(grid=(2, 3, 5), text=4, batch=2, heads=3)
    data.key_valid = torch.ones(2, 34, dtype=torch.bool)
    data.key_valid[0, 20:30] = False
    data.k[0, 20:30] = data.v[0, 20:30] = float("nan")
    rng = torch.Generator().manual_seed(0)
    call = data.call()
    one, two = (
        HeadOrder.by(torch.randint(0, 99, (2, 3, 30), generator=rng), call) for _ in range(2)
    )
    out = one.undo(regroup(call, one, two).attention().out)
    assert (out - data.attention()).abs().max() < 1e-12


@pytest.mark.parametrize("chosen", [40, 25])
def test_all_or_some_tokens_are_taken_and_put_back(chosen: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, 40, 3, 5, generator=rng)
    perm = torch.rand(2, 3, 40, generator=rng).argsort(-1)[..., :chosen]
    order = HeadOrder(perm.int())
    moved = order.apply(x)
    assert moved.shape == (2, chosen, 3, 5) and moved.is_contiguous()
    for b in range(2):
        for h in range(3):
            assert torch.equal(moved[b, :, h], x[b, perm[b, h], h])
    # A view that is not contiguous gives the same.
    assert torch.equal(order.apply(x.transpose(1, 2).contiguous().transpose(1, 2)), moved)
    back, lse_back = torch.zeros_like(x), torch.zeros(2, 3, 40)
    assert order.undo(moved, back) is back
    order.undo_lse(moved[..., 0].transpose(1, 2), lse_back)
    touched = torch.zeros(2, 3, 40, dtype=torch.bool).scatter_(2, perm, True)
    assert torch.equal(back, x.where(touched.transpose(1, 2)[..., None], 0.0))
    assert torch.equal(lse_back, x[..., 0].transpose(1, 2).where(touched, 0.0))
    if chosen == 40:
        strided = moved.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(order.undo(strided), x)
