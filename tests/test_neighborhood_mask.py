"""The order of tokens and the blocks of a neighborhood, against pairs of tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_neighborhood import axis, sees
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.neighborhood import Neighborhood
from dit_sparse.neighborhood_mask import Arrangement, arrange

CPU = torch.device("cpu")
# Text before and after the video.
TEXTS = st.sampled_from([(0, 0), (0, 1), (5, 0), (0, 20), (3, 4)])


def visible_pairs(layout: TokenLayout, neighborhood: Neighborhood) -> Tensor:
    """What sees what by the definition, ``[tokens, tokens]``, in the model's order."""
    coords = layout.coords()
    is_text = coords[:, 0] < 0
    keep = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    for a in range(3):
        parameters = [getattr(neighborhood, name)[a] for name in (
            "grid", "window", "stride", "dilation", "causal"
        )]  # fmt: skip
        n = parameters[0]
        table = torch.tensor([[sees(i, j, *parameters) for j in range(n)] for i in range(n)])
        keep &= table[coords[:, a]][:, coords[:, a]]
    return keep | is_text[:, None] | is_text


def blocks_of(keep: Tensor, block: int, empty: bool) -> Tensor:
    """``[blocks, block, blocks, block]``, filled up with ``empty``."""
    pad = -len(keep) % block
    padded = torch.nn.functional.pad(keep, (0, pad, 0, pad), value=empty)
    count = len(padded) // block
    return padded.view(count, block, count, block)


def dense(mask: Any, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if mask is None else mask.dense()[0, 0]


@st.composite
def problems(draw: Any) -> tuple[TokenLayout, Neighborhood, tuple[int, int, int], int]:
    axes = [draw(axis(longest)) for longest in (5, 9, 9)]
    grid, window, stride, dilation, causal = zip(*axes, strict=True)
    layout = TokenLayout.around(grid, *draw(TEXTS))
    tile = tuple(draw(st.integers(1, n)) for n in grid)
    neighborhood = Neighborhood.on(grid, window, stride, dilation, causal)
    return layout, neighborhood, tile, draw(st.sampled_from([4, 8, 16]))


@settings(max_examples=250, deadline=None)
@given(problems())
def test_blocks_are_those_of_the_pairs(problem: Any) -> None:
    layout, neighborhood, tile, block = problem
    found = arrange(layout, neighborhood, tile, block, CPU)
    keep = visible_pairs(layout, neighborhood)
    if found.order is not None:
        keep = keep[found.order.perm][:, found.order.perm]
    mask, positions = found.mask, torch.arange(layout.tokens)
    assert torch.equal(mask.visible(positions, positions), keep)
    assert float(mask.head_density) == pytest.approx(float(keep.double().mean()))
    whole = blocks_of(keep, block, True).all(3).all(1)
    touched = blocks_of(keep, block, False).any(3).any(1)
    full, partial = dense(mask.full, whole), dense(mask.partial, whole)
    assert torch.equal(full, whole)
    assert not (full & partial).any()
    assert torch.equal(full | partial, dense(mask.visited, whole))
    assert ((full | partial) | ~touched).all()


@settings(max_examples=150, deadline=None)
@given(problems())
def test_order_is_a_permutation_that_keeps_tiles_and_text(problem: Any) -> None:
    layout, neighborhood, tile, block = problem
    found = arrange(layout, neighborhood, tile, block, CPU)
    x = torch.randn(2, layout.tokens, 3)
    order = found.order
    if order is None:
        perm = torch.arange(layout.tokens)
    else:
        assert torch.equal(order.undo(order.apply(x)), x)
        perm = order.perm
    assert torch.equal(perm.sort().values, torch.arange(layout.tokens))
    coords = layout.coords()[perm]
    assert (coords[: layout.video] >= 0).all() and (coords[layout.video :] == -1).all()
    # Each tile of each dilation class is one run.
    dilation, size = torch.tensor(neighborhood.dilation), torch.tensor(tile)
    video = coords[: layout.video]
    labels = torch.cat([video % dilation, video // dilation // size], 1)
    changes = int((labels[1:] != labels[:-1]).any(1).sum())
    assert changes + 1 == len(labels.unique(dim=0))


def test_without_dilation_the_order_is_that_of_the_layout() -> None:
    layout = TokenLayout((3, 5, 7), 4, "text_video")
    found = arrange(layout, Neighborhood.on((3, 5, 7), 3), (2, 2, 3), 8, CPU)
    assert found.order is not None
    assert torch.equal(found.order.perm, layout.ordering((2, 2, 3)).perm)


def test_nothing_moves_where_the_order_is_right_already() -> None:
    whole = Neighborhood.on((2, 4, 8), (1, 3, 3))
    assert arrange(TokenLayout((2, 4, 8), 5), whole, (2, 4, 8), 8, CPU).order is None
    assert arrange(TokenLayout((2, 4, 8), 5), whole, (1, 1, 8), 8, CPU).order is None
    assert arrange(TokenLayout((2, 4, 8), 5, "text_video"), whole, (2, 4, 8), 8, CPU).order


@st.composite
def divisible(draw: Any) -> tuple[Neighborhood, tuple[int, int, int]]:
    tile = draw(st.sampled_from([(1, 2, 4), (2, 2, 2), (1, 1, 8), (1, 4, 2), (2, 4, 1)]))
    counts = [draw(st.integers(1, 4)) for _ in range(3)]
    grid = tuple(t * c for t, c in zip(tile, counts, strict=True))
    window = tuple(draw(st.integers(1, n)) for n in grid)
    # Mostly strides of a tile: others are hardly ever block-sparse.
    stride = tuple(
        min(w, draw(st.sampled_from([t, t, 2 * t, 1, 3])))
        for w, t in zip(window, tile, strict=True)
    )
    return Neighborhood.on(grid, window, stride), tile


@settings(max_examples=300, deadline=None)
@given(divisible())
def test_tiles_of_one_block_need_no_rule_exactly_if_windows_are_whole_tiles(problem: Any) -> None:
    neighborhood, tile = problem
    block = math.prod(tile)
    layout = TokenLayout(neighborhood.grid)
    mask = arrange(layout, neighborhood, tile, block, CPU).mask
    fits = True
    for a in range(3):
        n, w, t = neighborhood.grid[a], neighborhood.window[a], tile[a]
        starts = [window.low for window in neighborhood.windows(a)]
        one_window = all(len(set(starts[i : i + t])) == 1 for i in range(0, n, t))
        aligned = w % t == 0 and all(start % t == 0 for start in starts)
        fits &= w == n or (aligned and one_window)
    assert (mask.partial is None) == fits
    # Boxes: only blocks that do hold a visible pair are visited.
    keep = visible_pairs(layout, neighborhood)
    perm = layout.ordering(tile).perm
    touched = blocks_of(keep[perm][:, perm], block, False).any(3).any(1)
    assert torch.equal(mask.visited.dense()[0, 0], touched)
    if fits:
        assert float(mask.head_density) == pytest.approx(neighborhood.density())
        assert mask.visited.density() == pytest.approx(neighborhood.density())


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tile", "block"),
    [
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 128),
        ((30, 48, 80), (30, 40, 40), (1, 32, 8), (1, 8, 8), 64),
        ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 8, 16), 128),
        ((16, 44, 80), (16, 12, 24), (1, 4, 8), (4, 4, 8), 128),
    ],
)
def test_published_settings_are_block_sparse(
    grid: Any, window: Any, stride: Any, tile: Any, block: int
) -> None:
    neighborhood = Neighborhood.on(grid, window, stride)
    mask = arrange.__wrapped__(TokenLayout(grid), neighborhood, tile, block, CPU).mask
    assert mask.partial is None
    assert mask.visited.density() == pytest.approx(neighborhood.density())


def test_a_ragged_grid_is_not_padded_and_columns_of_groups_waste_little() -> None:
    layout = TokenLayout((13, 30, 45))
    neighborhood = Neighborhood.on(layout.grid, (13, 18, 27), (1, 6, 9))

    def waste(tile: tuple[int, int, int]) -> float:
        mask = arrange.__wrapped__(layout, neighborhood, tile, 64, CPU).mask
        return mask.visited.density() / neighborhood.density()

    assert waste((13, 6, 9)) < 1.06
    assert waste((4, 4, 4)) > 1.3


def test_text_is_seen_by_all_and_sees_all() -> None:
    layout = TokenLayout((2, 4, 6), 10, "text_video")
    found: Arrangement = arrange(layout, Neighborhood.on((2, 4, 6), 1), (1, 2, 4), 8, CPU)
    positions = torch.arange(58)
    seen = found.mask.visible(positions, positions)
    assert seen[:48, :48].sum() == 48
    assert seen[48:].all() and seen[:, 48:].all()


def test_the_mask_is_made_once() -> None:
    layout, neighborhood = TokenLayout((2, 4, 6)), Neighborhood.on((2, 4, 6), 2)
    first = arrange(layout, neighborhood, (1, 2, 4), 8, CPU)
    assert arrange(TokenLayout((2, 4, 6)), neighborhood, (1, 2, 4), 8, CPU) is first
    assert arrange(TokenLayout((2, 4, 6), 1), neighborhood, (1, 2, 4), 8, CPU) is not first


def test_moving_to_a_device_moves_everything() -> None:
    found = arrange(TokenLayout((2, 4, 6)), Neighborhood.on((2, 4, 6), 2), (1, 2, 4), 8, CPU)
    moved = found.mask.to("meta")
    tensors = [moved.place, moved.low, moved.high, moved.head_density]
    masks = [m for m in (moved.full, moved.partial, moved.visited) if m is not None]
    assert {t.device.type for t in tensors} | {m.device.type for m in masks} == {"meta"}
    assert (moved.video, moved.block) == (48, (8, 8))
