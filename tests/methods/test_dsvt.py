"""DSVT: sets, their rotation, and what two layers connect."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.dsvt import DSVT, set_partition

CPU = torch.device("cpu")


def sets_of(
    layout: TokenLayout, window: tuple, sets: int, axis: int, shifted: bool = False
) -> torch.Tensor:
    """Set of every video token, in the model's order."""
    order, member = set_partition(layout, window, sets, axis, shifted, CPU)
    assert (member.diff() >= 0).all()
    start = layout.video_start
    found = torch.empty(layout.video, dtype=torch.int64)
    found[order.perm[: layout.video] - start] = member
    outside = torch.arange(layout.tokens)
    outside = outside[(outside < start) | (outside >= start + layout.video)]
    assert torch.equal(order.perm[layout.video :], outside)
    assert torch.equal(order.perm.sort().values, torch.arange(layout.tokens))
    return found


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    "layout", [TokenLayout((3, 8, 12)), TokenLayout((3, 7, 10), 5, "text_video")]
)
def test_windows_are_split_into_equal_sets(layout: TokenLayout, axis: int, shifted: bool) -> None:
    window, sets = (2, 4, 4), 4
    found = sets_of(layout, window, sets, axis, shifted)
    start = layout.video_start
    coords = layout.coords()[start : start + layout.video]
    size = torch.tensor(window)
    places = (coords + (size // 2 if shifted else 0)) // size
    for place in places.unique(dim=0):
        inside = (places == place).all(-1)
        _, counts = found[inside].unique(return_counts=True)
        # Set k of N tokens: floor(k S / N) differs in size by one token at most.
        assert counts.max() - counts.min() <= 1
        assert len(counts) == min(sets, int(inside.sum()))
        # A set is a slice: none begins before the one below it along the axis has ended.
        slices = [coords[found == number, axis] for number in found[inside].unique()]
        assert all(low.max() <= high.min() for low, high in pairwise(slices))
        # No set reaches into another window.
        assert not torch.isin(found[~inside], found[inside]).any()


def test_the_formula_of_the_paper() -> None:
    # Equation 2: token k of set j of S sets of tau tokens is number floor((j tau + k) N / (S tau)).
    total, sets = 24, 3
    tau = total // sets
    index = torch.arange(sets)[:, None] * tau + torch.arange(tau)
    paper = index * total // (sets * tau)
    found = sets_of(TokenLayout((1, 4, 6)), (1, 4, 6), sets, 1)
    for number in range(sets):
        assert torch.equal((found == number).nonzero()[:, 0], paper[number])


def masks(method: DSVT, data: Any, layers: range) -> list[torch.Tensor]:
    """Pairs of tokens kept in each layer, in the model's order."""
    kept = []
    for layer in layers:
        memory: dict[str, Any] = {}
        call = data.call(0, memory)
        call.layer = layer
        method.attend(call)
        order = method.order(call)
        tokens = memory["mask"].lists().tokens()[0, 0]
        kept.append(tokens[order.inverse][:, order.inverse])
    return kept


def test_two_layers_connect_all_tokens_of_a_window(make: Any) -> None:
    data = make(grid=(2, 16, 16))
    one, two = masks(DSVT(4, warmup=0), data, range(2))
    assert not one.all()
    assert not torch.equal(one, two)
    # Four sets of 128 tokens end at block borders: the mask is the sets and no more.
    found = sets_of(data.layout, (2, 16, 16), 4, 1)
    assert torch.equal(one, found[:, None] == found)
    assert (one.double() @ two.double() > 0).all()


def test_shifted_windows_connect_windows(make: Any) -> None:
    data = make(grid=(2, 16, 32))
    layers = masks(DSVT(2, (2, 16, 16), warmup=0), data, range(4))
    reach = torch.eye(1024).double()
    for layer, mask in enumerate(layers):
        reach = ((mask.double() @ reach) > 0).double()
        if layer == 1:
            columns = torch.arange(1024) % 32
            same = columns[:, None] // 16 == columns // 16
            assert torch.equal(reach > 0, same)
    assert (reach > 0).double().mean() > 0.7


def test_sets_that_end_inside_a_block_are_kept_whole(make: Any) -> None:
    data = make(grid=(3, 7, 11), text=3)
    (mask,) = masks(DSVT(3, warmup=0), data, range(1))
    found = sets_of(data.layout, (3, 7, 11), 3, 1)
    same = found[:, None] == found
    assert (mask[:231, :231] | ~same).all()
