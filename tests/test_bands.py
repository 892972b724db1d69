"""Bands and columns: formulas, and the token-level patterns that they stand for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dit_sparse.bands import (
    FULL,
    SKIP,
    BandMask,
    HeadPattern,
    TokenOrder,
    band_width,
    half_width,
)
from dit_sparse.layout import TokenLayout


@pytest.mark.parametrize("density", [0.03, 0.125, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [100, 1000, 4000])
def test_band_width_reproduces_its_density(density: float, tokens: int) -> None:
    width = band_width(density, tokens)
    places = torch.arange(tokens)
    kept = ((places[:, None] - places).abs() < width).double().mean()
    assert abs(float(kept) - density) <= 2 / tokens


@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
def test_half_width_is_the_nearest_in_whole_blocks(blocks: int) -> None:
    densities = [float(HeadPattern(b).kept(blocks).double().mean()) for b in range(blocks)]
    for wanted in (0.01, 0.1, 0.25, 0.37, 0.6, 1.0):
        error = abs(densities[half_width(wanted, blocks)] - wanted)
        # A band has the area of its continuous twin up to a quarter of a block squared.
        assert error <= min(abs(d - wanted) for d in densities) + 0.5 / blocks**2
    assert densities[half_width(1.0, blocks)] == 1.0


def test_a_band_without_neighbours_is_block_diagonal_and_a_wide_one_is_dense() -> None:
    assert HeadPattern(0).kept(5).equal(torch.eye(5, dtype=torch.bool))
    assert HeadPattern(4).kept(5).all()
    assert FULL.kept(5).all()
    assert not SKIP.kept(5).any()


@pytest.mark.parametrize(("count", "shift"), [(1, 0.0), (3, 0.0), (3, 0.5), (4, 0.99), (40, 0.3)])
@pytest.mark.parametrize("blocks", [1, 10, 32, 33])
def test_columns_are_evenly_spaced_and_seen_by_every_query(
    count: int, shift: float, blocks: int
) -> None:
    pattern = HeadPattern(columns=count, shift=shift)
    columns = pattern.column_blocks(blocks)
    assert len(set(columns)) == min(count, blocks)
    assert set(columns) <= set(range(blocks))
    gaps = {b - a for a, b in pairwise(columns)}
    assert gaps <= {blocks // len(columns), -(-blocks // len(columns))}
    keep = pattern.kept(blocks)
    assert keep.equal(keep[:1].expand_as(keep))
    assert keep[0].nonzero()[:, 0].tolist() == columns


def test_shift_moves_columns_by_a_share_of_their_spacing() -> None:
    assert HeadPattern(columns=4, shift=0.0).column_blocks(32) == [0, 8, 16, 24]
    assert HeadPattern(columns=4, shift=0.25).column_blocks(32) == [2, 10, 18, 26]
    assert HeadPattern(columns=4, shift=0.875).column_blocks(32) == [7, 15, 23, 31]


@pytest.mark.parametrize("width", [0, 1, 2])
def test_a_position_major_band_is_evenly_spaced_diagonals_of_the_frame_major_matrix(
    width: int,
) -> None:
    frames, height, columns = 4, 3, 5
    layout = TokenLayout((frames, height, columns))
    # Blocks of one place in all frames.
    bands = BandMask((HeadPattern(width, order="position_major"),), frames, layout)
    place = torch.arange(layout.tokens)
    distance = (place[:, None] - place).abs()
    area = height * columns
    expected = torch.zeros_like(distance, dtype=torch.bool)
    for frame in range(frames):
        expected |= (distance - frame * area).abs() <= width
    # A diagonal does not wrap around from one frame's end to the next one's beginning.
    within = place % area
    expected &= (within[:, None] - within).abs() <= width
    assert bands.tokens(0).equal(expected)
    if width == 0:
        assert bands.tokens(0).equal(distance % area == 0)


TEXTS = [(0, 0), (0, 1), (6, 0), (37, 0), (0, 37), (5, 9)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["frame_major", "position_major"])
def test_reordering_and_back_is_the_identity(text: tuple[int, int], name: TokenOrder) -> None:
    layout = TokenLayout.around((3, 4, 5), *text)
    order = BandMask((FULL,), 8, layout).ordering(name, torch.device("cpu"))
    x = torch.randn(2, layout.tokens, 3)
    if order is None:
        assert name == "frame_major" and text[0] == 0
        return
    assert order.undo(order.apply(x)).equal(x)
    coords = order.apply(layout.coords(), 0)
    assert (coords[60:] == -1).all()
    key = coords[:60] @ torch.tensor([20, 5, 1] if name == "frame_major" else [1, 15, 3])
    assert key.equal(torch.arange(60))


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept_whole_by_every_head_that_is_not_skipped(text: tuple[int, int]) -> None:
    layout = TokenLayout.around((3, 4, 5), *text)
    heads = (HeadPattern(0), HeadPattern(columns=1), HeadPattern(0, order="position_major"), SKIP)
    bands = BandMask(heads, 8, layout)
    is_text = layout.coords()[:, 0] < 0
    video = ~is_text
    for head in range(3):
        keep = bands.tokens(head)
        assert keep[is_text].all() and keep[:, is_text].all()
        assert not keep[video][:, video].all()
    assert not bands.tokens(3).any()
    density = [float(bands.tokens(head).double().mean()) for head in range(4)]
    torch.testing.assert_close(bands.head_density()[0].double(), torch.tensor(density).double())


def test_heads_are_grouped_by_token_order_without_the_skipped_ones() -> None:
    placed = HeadPattern(1, order="position_major")
    bands = BandMask((placed, SKIP, FULL, placed, HeadPattern(0)), 8, TokenLayout((2, 3, 4)))
    assert bands.groups() == {"position_major": (0, 3), "frame_major": (2, 4)}
    assert BandMask((SKIP,), 8, TokenLayout((2, 3, 4))).groups() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"half_width": -1}, "half_width must be 0 or more"),
        ({"columns": -1}, "columns must be 0 or more"),
        ({"columns": 1, "shift": 1.0}, "shift must be"),
        ({"columns": 1, "shift": math.nan}, "shift must be"),
        ({"half_width": 1, "order": "raster"}, "order must be"),
        ({}, "a band or columns, or else is skipped"),
        ({"half_width": 1, "skip": True}, "a band or columns, or else is skipped"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadPattern(**values)


def test_a_mask_needs_heads_and_a_block() -> None:
    with pytest.raises(ValueError, match="a pattern for each head"):
        BandMask((), 64, TokenLayout((1, 2, 3)))
    with pytest.raises(ValueError, match="at least 1 token"):
        BandMask((FULL,), 0, TokenLayout((1, 2, 3)))
