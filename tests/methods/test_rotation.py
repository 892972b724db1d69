"""Which part of a call is refreshed when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.rotation import part_of_turn, turns_since


@pytest.mark.parametrize("unit", ["rows", "heads", "all", "never"])
@pytest.mark.parametrize("period", [1, 3, 8, 40])
@pytest.mark.parametrize("text", [0, 11])
def test_ages_count_the_turns_since_the_refresh(
    make: Any, unit: str, period: int, text: int
) -> None:
    data = make(grid=(3, 9, 13), text=text, heads=3)
    call = data.call().ordered(data.call().tile_order((2, 4, 4)))
    call.layer = 2
    last = torch.zeros(1, data.layout.tokens, 3, 1)
    for turn in range(2 * period + 3):
        part = part_of_turn(call, unit, period, turn, 64)
        if part is not None:
            last[part.index] = turn
        age = turns_since(call, unit, period, turn, 64)
        # Text is exact in every step: its age does not matter.
        video = data.layout.video // 64 * 64 if text else data.layout.video
        found = (turn - last).expand(1, -1, 3, 1)[:, :video]
        assert torch.equal(age.expand(1, data.layout.tokens, 3, 1)[:, :video].float(), found)
    if unit != "never":
        assert (turn - last[:, :video] < period).all()


def test_a_part_holds_the_queries_that_it_names(make: Any) -> None:
    data = make(grid=(3, 9, 13), heads=3)
    call = data.call()
    part = part_of_turn(call, "rows", 4, 1, 64)
    assert part is not None and part.rows is not None
    # 351 tokens in blocks of 64: the sixth is ragged and belongs to this turn.
    assert part.rows.tolist() == [*range(64, 128), *range(320, 351)]
    assert torch.equal(part.call.q, call.q[:, part.rows])
    assert part.call.k is call.k
    assert torch.equal(call.v[part.index], call.v[:, part.rows])
    part = part_of_turn(call, "heads", 2, 1, 64)
    assert part is not None
    assert torch.equal(part.call.k, call.k[:, :, 1::2])
    assert part_of_turn(call, "heads", 8, 5, 64) is None


def test_layers_take_turns_at_different_places(make: Any) -> None:
    data = make()
    first = []
    for layer in range(3):
        call = data.call()
        call.layer = layer
        part = part_of_turn(call, "rows", 4, 1, 64)
        assert part is not None and part.rows is not None
        first.append(int(part.rows[0]))
    assert len(set(first)) == 3


@pytest.mark.parametrize("unit", ["rows", "heads", "all"])
@pytest.mark.parametrize("turns", [1, 2, 3, 5])
def test_turns_taken_at_once_refresh_what_they_would_one_by_one(
    make: Any, unit: str, turns: int
) -> None:
    data = make(grid=(3, 9, 13), text=11, heads=7)
    call = data.call().ordered(data.call().tile_order((2, 4, 4)))
    call.layer = 1

    def touched(turn: int, at_once: int) -> torch.Tensor:
        there = torch.zeros(data.q.shape[:3], dtype=torch.bool)
        part = part_of_turn(call, unit, 5, turn, 64, at_once)
        if part is not None:
            there[part.index] = True
            assert torch.equal(part.call.k, call.k[:, :, part.heads])
        return there[:, : data.layout.video // 64 * 64]

    for turn in range(turns, 3 * turns + 1):
        singly = torch.stack([touched(turn - n, 1) for n in range(turns)]).any(0)
        if turn >= turns and turn - turns >= 0 and singly.all():
            assert touched(turn, turns).all()
        else:
            assert torch.equal(touched(turn, turns), singly)


def test_no_turn_refreshes_nothing(make: Any) -> None:
    assert part_of_turn(make().call(), "rows", 4, 3, 64, turns=0) is None
    assert part_of_turn(make().call(), "rows", 4, 0, 64, turns=0) is not None
