"""Static masks: which blocks the paper's band touches, and which blocks are nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.mask import block_count
from dit_sparse.methods.base import video_blocks
from dit_sparse.methods.windows import nearest_window, raster_window

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout((4, 10, 20)),
    TokenLayout((5, 9, 13), 7),
    TokenLayout((13, 3, 5), 226),
    TokenLayout((1, 17, 16), 1),
    TokenLayout((2, 6, 50)),
    TokenLayout((3, 5, 5), 3),
]


def band(layout: TokenLayout, sparsity: float) -> Tensor:
    """The paper's pairs of video tokens, written down token by token."""
    frame = layout.grid[1] * layout.grid[2]
    half = int(frame * (1 - sparsity)) // 2
    place = torch.arange(layout.video) % frame
    return (place[:, None] - place).abs() <= half


def blocks_with_a_pair(pairs: Tensor, block: int) -> Tensor:
    """Blocks of a token matrix in which anything is set."""
    count = block_count(len(pairs), block)
    pad = count * block - len(pairs)
    padded = torch.nn.functional.pad(pairs, (0, pad, 0, pad))
    return padded.view(count, block, count, block).any(3).any(1)


@pytest.mark.parametrize("sparsity", [0.96875, 0.8, 0.5])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_raster_window_keeps_the_blocks_that_the_band_touches(
    layout: TokenLayout, block: int, sparsity: float
) -> None:
    keep = raster_window(layout, sparsity, block, CPU).dense()[0, 0]
    video = video_blocks(layout, block)
    pairs = band(layout, sparsity)
    assert torch.equal(keep[:video, :video], blocks_with_a_pair(pairs, block)[:video, :video])
    tokens = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert tokens[: layout.video, : layout.video][pairs].all()
    assert keep[video:].all()
    assert keep[:, video:].all()


def test_the_band_of_cogvideox_is_the_papers() -> None:
    # 49 frames of 720x480: 43 of 1,350 positions, cut off at the borders of a frame.
    pairs = band(TokenLayout((1, 30, 45)), 0.96875)
    assert int(pairs.sum(-1).max()) == 43
    assert int(pairs[0].sum()) == 22
    density = float(pairs.double().mean())
    assert round(density, 4) == 0.0316
    # Whole blocks of it keep four times as much.
    layout = TokenLayout((13, 30, 45), 226)
    mask = raster_window(layout, 0.96875, 64, CPU)
    text = 1 - (layout.video / layout.tokens) ** 2
    assert density * (1 - text) + text < mask.density() < 0.16


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_without_sparsity_windows_keep_everything(layout: TokenLayout) -> None:
    assert raster_window(layout, 0.0, 64, CPU).dense().all()
    assert nearest_window(layout, 0.0, 64, (4, 4, 4), CPU).dense().all()


@pytest.mark.parametrize("tile", [None, (4, 4, 4), (1, 8, 8), (2, 3, 5)])
@pytest.mark.parametrize("sparsity", [0.95, 0.7])
@pytest.mark.parametrize(
    "layout",
    [TokenLayout((8, 16, 16)), TokenLayout((7, 9, 30), 21), TokenLayout((1, 40, 24), 5)],
    ids=str,
)
def test_nearest_window_keeps_the_nearest_blocks(
    layout: TokenLayout, sparsity: float, tile: tuple[int, int, int] | None
) -> None:
    keep = nearest_window(layout, sparsity, 64, tile, CPU).dense()[0, 0]
    video = video_blocks(layout, 64)
    assert keep[video:].all()
    assert keep[:, video:].all()
    window = keep[:video, :video]
    assert (window.sum(-1) == max(1, round((1 - sparsity) * video))).all()
    assert window.diagonal().all()
    grid = TokenLayout(layout.grid)
    coords = grid.coords().double()[grid.ordering(tile or (1, 1, layout.grid[2])).perm]
    centre = torch.stack([part.mean(0) for part in coords.split(64)])[:video]
    apart = ((centre[:, None] - centre).abs() / torch.tensor(layout.grid)).amax(-1)
    farthest_kept = apart.masked_fill(~window, 0).amax(-1)
    nearest_skipped = apart.masked_fill(window, 9).amin(-1)
    # The tie break may decide between distances that differ by less than it weighs.
    assert (farthest_kept <= nearest_skipped + 1e-3 * 3**0.5).all()


def test_nearest_window_has_the_shape_of_the_grid() -> None:
    # 8 x 8 x 8 tiles of one block each; 27 are the tile and its neighbours.
    layout = TokenLayout((32, 32, 32))
    keep = nearest_window(layout, 1 - 27 / 512, 64, (4, 4, 4), CPU).dense()[0, 0]
    box = keep.view(8, 8, 8, 8, 8, 8)[3, 4, 5]
    expected = torch.zeros(8, 8, 8, dtype=torch.bool)
    expected[2:5, 3:6, 4:7] = True
    assert torch.equal(box, expected)
    corner = keep.view(8, 8, 8, 8, 8, 8)[0, 0, 0]
    assert int(corner.sum()) == 27
    assert corner[:2, :2, :2].all()


def test_of_equally_distant_blocks_the_straight_neighbours_come_first() -> None:
    keep = nearest_window(TokenLayout((32, 32, 32)), 1 - 7 / 512, 64, (4, 4, 4), CPU).dense()
    box = keep.view(8, 8, 8, 8, 8, 8)[3, 4, 5]
    offsets = (box.nonzero() - torch.tensor([3, 4, 5])).abs().sum(-1)
    assert sorted(offsets.tolist()) == [0, 1, 1, 1, 1, 1, 1]


def test_windows_are_made_once() -> None:
    layout = TokenLayout((4, 8, 16), 5)
    assert raster_window(layout, 0.5, 64, CPU) is raster_window(layout, 0.5, 64, CPU)
    arguments = (layout, 0.5, 64, (4, 4, 4), CPU)
    assert nearest_window(*arguments) is nearest_window(*arguments)
