"""Strides against coordinates, and the orders that gather their classes."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.strides import check_stride, residues, token_group

CPU = torch.device("cpu")
# Axes held fixed, by name; frames, height, width are 0, 1, 2.
FIXED = {"w": [2], "hw": [1, 2], "t": [0], "wt": [0, 2], "h": [1], "th": [0, 1]}
GRIDS = [(4, 6, 8), (3, 5, 7), (1, 6, 5), (2, 2, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", FIXED)
def test_a_stride_holds_its_axes_fixed(name: str, grid: tuple[int, int, int]) -> None:
    layout = TokenLayout(grid)
    sigma, residue = residues(name, layout)
    fixed = layout.coords()[:, FIXED[name]]
    same = (fixed[:, None] == fixed[None]).all(-1)
    assert torch.equal(residue[:, None] == residue[None], same)
    assert sigma == len(residue.unique()) == fixed.unique(dim=0).shape[0]


def test_multiples_and_numbers_of_tokens() -> None:
    layout = TokenLayout((4, 6, 8))
    raster = torch.arange(layout.video)
    for name, sigma in (("2hw", 96), ("hw", 48), ("8", 8), ("24", 24), ("3w", 24), ("1w", 8)):
        assert residues(name, layout)[0] == sigma
        assert torch.equal(residues(name, layout)[1], raster % sigma)
    # "2t": every frame in two classes.
    sigma, residue = residues("2t", layout)
    assert sigma == 8
    frame = layout.coords()[:, 0]
    assert all(len(residue[frame == t].unique()) == 2 for t in range(4))
    # A stride longer than the video leaves every token alone.
    assert residues("1000000000", layout)[0] == layout.video
    assert torch.equal(residues("1000000000", layout)[1], raster)


@pytest.mark.parametrize("wrong", ["", "0", "x", "ww", "0w", "-8", "2", 8, None, "tw"])
def test_other_names_are_refused(wrong: object) -> None:
    if wrong == "2":
        check_stride(wrong)
        return
    with pytest.raises(ValueError, match="a stride is one of"):
        check_stride(wrong)


@pytest.mark.parametrize("tile", [None, (2, 4, 4)])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 9), (9, 0), (4, 5)])
def test_orders_gather_classes(before: int, after: int, tile: tuple[int, int, int] | None) -> None:
    layout = TokenLayout.around((3, 10, 8), before, after)
    text = before + after
    names = ("w", "hw", "t", "2hw", "7")
    group = token_group(layout, None, True, names, tile, 64, CPU)
    assert (group.video, group.size) == (240, 240 + text)
    assert group.blocks == (3 if text else 4)
    assert group.tokens.sort().values.tolist() == list(range(layout.tokens))
    assert (layout.coords()[group.tokens[:240], 0] >= 0).all()
    every = torch.arange(240)
    assert all(torch.equal(one.sort().values, every) for one in group.orders)
    expected = layout.ordering(tile or (1, 1, 8)).perm[:240]
    assert torch.equal(group.tokens[group.orders[0]], expected)
    assert torch.equal(group.rank, every)
    for k in range(len(names)):
        gathered = group.residue[k][group.orders[1 + k]]
        assert (gathered.diff() >= 0).all()
        # Stable: in raster order within a class.
        moves = group.orders[1 + k].diff()
        assert (moves[gathered.diff() == 0] > 0).all()
        for block in range(group.blocks):
            inside = gathered[block * 64 : (block + 1) * 64]
            assert (group.low[1 + k, block], group.high[1 + k, block]) == (inside[0], inside[-1])
            assert (group.place[1 + k] == block).sum() == len(inside)
            assert set(every[group.place[1 + k] == block].tolist()) == set(
                group.orders[1 + k][block * 64 : (block + 1) * 64].tolist()
            )
        members = group.members[k]
        for phase in range(group.sigma[k]):
            listed = members[phase][members[phase] < 240]
            assert torch.equal(listed.sort().values, every[group.residue[k] == phase])
    assert group.usable == (True, True, True, False, True)


def test_a_group_of_some_ranges() -> None:
    layout = TokenLayout((4, 4, 4), 5, "text_video")
    # Frames 0 and 2 in the model's order, where the text comes first.
    group = token_group(layout, ((5, 21), (37, 53)), True, ("t", "hw"), None, 16, CPU)
    assert group.video == 32
    assert set(layout.coords()[group.tokens[:32], 0].tolist()) == {0, 2}
    assert set(layout.coords()[group.tokens[32:], 0].tolist()) == {-1}
    # Residues are those of the whole video: classes of frames 1 and 3 are empty here.
    assert group.residue[0].unique().tolist() == [0, 2]
    assert [int((m < 32).sum()) for m in group.members[0]] == [16, 0, 16, 0]
    assert group.rank.tolist() == [*range(16), *range(32, 48)]
