"""Where each token stands, and the order that makes tiles contiguous."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import Ordering, TokenLayout, spread_rows_on, tile_ordering_on

Order = Literal["video_text", "text_video"]
ORDERS: tuple[Order, ...] = ("video_text", "text_video")
axes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))
layouts = st.builds(TokenLayout.around, axes, st.integers(0, 9), st.integers(0, 9))


@pytest.mark.parametrize("order", ORDERS)
def test_coords_are_row_major_with_width_fastest(order: Order) -> None:
    layout = TokenLayout((2, 3, 4), 5, order)
    video = [list(place) for place in itertools.product(range(2), range(3), range(4))]
    text = [[-1, -1, -1]] * 5
    expected = text + video if order == "text_video" else video + text
    assert layout.coords().tolist() == expected
    assert layout.coords().dtype == torch.int64
    assert (layout.video, layout.tokens) == (24, 29)
    assert layout.video_start == (5 if order == "text_video" else 0)


def test_text_may_stand_on_both_sides() -> None:
    layout = TokenLayout((1, 2, 2), 5, "split", 2)
    assert layout == TokenLayout.around((1, 2, 2), before=2, after=3)
    assert (layout.video_start, layout.tokens) == (2, 9)
    assert (layout.coords()[:, 0] >= 0).tolist() == [False] * 2 + [True] * 4 + [False] * 3
    # Video first, then the text in its own order.
    assert layout.ordering((1, 1, 2)).perm.tolist() == [2, 3, 4, 5, 0, 1, 6, 7, 8]


def test_equal_layouts_are_one_value_however_they_are_written() -> None:
    grid = (1, 2, 2)
    assert TokenLayout.around(grid, before=3) == TokenLayout(grid, 3, "text_video")
    assert TokenLayout.around(grid, after=3) == TokenLayout(grid, 3, "video_text")
    assert TokenLayout.around(grid) == TokenLayout(grid)
    assert hash(TokenLayout(grid, 3, "text_video", 3)) == hash(TokenLayout(grid, 3, "text_video"))
    assert TokenLayout(grid, 3, "text_video") != TokenLayout(grid, 3)


def test_tile_order_of_a_small_grid_is_exact() -> None:
    # Rows 0-1 and columns 0-1 first; the far tiles are narrower, nothing is padded.
    perm = TokenLayout((1, 2, 3), 2, "text_video").ordering((1, 2, 2)).perm
    assert perm.tolist() == [2, 3, 5, 6, 4, 7, 0, 1]


@settings(max_examples=80, deadline=None)
@given(layouts, axes)
def test_ordering_is_a_permutation_that_undoes_itself(
    layout: TokenLayout, tile: tuple[int, int, int]
) -> None:
    order = layout.ordering(tile)
    assert order.perm.sort().values.tolist() == list(range(layout.tokens))
    x = torch.randn(2, layout.tokens, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.undo(order.apply(x)), x)
    assert torch.equal(order.apply(order.undo(x)), x)
    moved = x.transpose(1, 2)
    assert torch.equal(order.undo(order.apply(moved, dim=2), dim=2), moved)


@settings(max_examples=80, deadline=None)
@given(layouts, axes)
def test_every_tile_is_one_run_and_text_is_last(
    layout: TokenLayout, tile: tuple[int, int, int]
) -> None:
    coords = layout.coords()[layout.ordering(tile).perm]
    assert (coords[layout.video :] == -1).all()
    video = coords[: layout.video]
    assert (video >= 0).all()
    tiles = (video // torch.tensor(tile)).tolist()
    runs = [key for key, _ in itertools.groupby(tiles)]
    # As many runs as tiles, in row-major order of the tiles: none is split, ragged ones included.
    assert runs == sorted(runs)
    assert len(runs) == len({tuple(run) for run in runs})
    for _, run in itertools.groupby(range(layout.video), key=lambda n: tiles[n]):
        places = video[list(run)].tolist()
        assert places == sorted(places)


@settings(max_examples=40, deadline=None)
@given(axes, axes, st.integers(0, 5), st.sampled_from(ORDERS))
def test_dividing_tiles_fill_whole_blocks(
    tile: tuple[int, int, int], count: tuple[int, int, int], text: int, order: Order
) -> None:
    grid = tuple(t * min(c, 3) for t, c in zip(tile, count, strict=True))
    layout = TokenLayout(grid, text, order)
    size = tile[0] * tile[1] * tile[2]
    video = layout.coords()[layout.ordering(tile).perm][: layout.video]
    blocks = (video // torch.tensor(tile)).view(-1, size, 3)
    assert (blocks == blocks[:, :1]).all()


def test_text_keeps_its_own_order() -> None:
    for order in ORDERS:
        layout = TokenLayout((2, 2, 3), 4, order)
        start = 0 if order == "text_video" else 12
        assert layout.ordering((1, 2, 2)).perm[12:].tolist() == list(range(start, start + 4))


def test_ordering_is_cached_per_layout_tile_and_device() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    layout = TokenLayout((2, 4, 4), 3)
    first = tile_ordering_on(layout, (2, 2, 2), cpu)
    # An equal layout, not the same object, finds the same tensors.
    assert tile_ordering_on(TokenLayout((2, 4, 4), 3), (2, 2, 2), cpu) is first
    assert tile_ordering_on(layout, (1, 2, 2), cpu) is not first
    assert tile_ordering_on(layout, (2, 2, 2), meta).perm.device == meta
    assert tile_ordering_on(layout, (2, 2, 2), meta) is tile_ordering_on(layout, (2, 2, 2), meta)


def test_from_perm_inverts() -> None:
    order = Ordering.from_perm(torch.tensor([2, 0, 3, 1]))
    assert order.inverse.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 2, 2),), "grid must be"),
        (((2, 2),), "grid must be"),
        (((1, 2, 2), -1), "text must be"),
        (((1, 2, 2), 0, "text_first"), "order must be"),
        (((1, 2, 2), 3, "split"), "both sides"),
        (((1, 2, 2), 3, "split", 3), "both sides"),
        (((1, 2, 2), 3, "text_video", 2), "text_before goes with"),
    ],
)
def test_impossible_layouts_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(*arguments)


def test_negative_text_is_refused() -> None:
    with pytest.raises(ValueError, match="before and after must be"):
        TokenLayout.around((1, 2, 2), before=-1, after=2)


@pytest.mark.parametrize("tile", [(2, 2), (0, 2, 2), (1, 1, 1, 1)])
def test_impossible_tiles_are_refused(tile: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tile must be"):
        TokenLayout((2, 2, 2)).ordering(tile)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [2, 4])
def test_spread_rows_share_every_line_of_a_tile(stride: int) -> None:
    layout, tile = TokenLayout((4, 8, 12), 7, "text_video"), (4, 4, 4)
    rows = spread_rows_on(layout, tile, stride, torch.device("cpu"))
    # One of every run, hence the same number in every block.
    assert torch.equal(rows // stride, torch.arange(-(-layout.tokens // stride)))
    assert rows.max() < layout.tokens
    coords = layout.coords()[layout.ordering(tile).perm[rows[rows < layout.video]]]
    counts = torch.zeros(layout.grid, dtype=torch.int64)
    counts[tuple(coords.T)] += 1
    tiles = counts.view(1, 4, 2, 4, 3, 4)
    for axis in (1, 3, 5):
        assert (tiles.sum(axis) == 4 // stride).all()


def test_spread_rows_of_ragged_grids_are_one_of_every_run() -> None:
    for grid, tile, text in (((3, 5, 7), (2, 3, 5), 2), ((1, 3, 3), (1, 1, 3), 0)):
        layout = TokenLayout(grid, text)
        rows = spread_rows_on(layout, tile, 4, torch.device("cpu"))
        assert torch.equal(rows // 4, torch.arange(-(-layout.tokens // 4)))
        assert rows.max() < layout.tokens
