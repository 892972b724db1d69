"""Orders of tokens by head."""

from __future__ import annotations

from typing import Any

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
