from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from dit_sparse.pipelines.captions import BACKGROUNDS, OBJECTS, Scene

from training.clips import SpriteAtlas, ClipGenerator  # isort: skip


@pytest.fixture(scope="module")
def clips() -> ClipGenerator:
    """White discs over black: nothing but the motion shows."""
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    disc = np.uint8(255 * (x**2 + y**2 < 0.9))
    sprites = np.stack([np.stack([disc] * 4, -1)] * len(OBJECTS))
    return ClipGenerator(SpriteAtlas(sprites, np.zeros((len(BACKGROUNDS), 256, 256, 3), np.uint8)))


def _render(clips: ClipGenerator, motion: str, size=(16, 64, 64)) -> torch.Tensor:
    scene = Scene((("cat", motion),), "a gray wall", "still camera")
    return (clips.render([scene], *size, seed=0)[0, 0] + 1) / 2


def _centre(frame: torch.Tensor) -> tuple[float, float]:
    ys, xs = torch.meshgrid(*(torch.arange(n) for n in frame.shape), indexing="ij")
    return float((xs * frame).sum() / frame.sum()), float((ys * frame).sum() / frame.sum())


@pytest.mark.parametrize("size", [(16, 64, 64), (32, 48, 80), (2, 80, 48)])
def test_shape_range_and_captions(clips: ClipGenerator, size: tuple[int, int, int]) -> None:
    video, captions = clips.sample(3, *size, seed=1)
    assert video.shape == (3, 3, *size)
    assert video.min() >= -1 and video.max() <= 1
    assert len(captions) == 3 and all(" over " in caption for caption in captions)


def test_a_seed_fixes_everything(clips: ClipGenerator) -> None:
    first, again, other = (clips.sample(2, 4, 32, 32, seed=s) for s in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], other[0])


def test_a_generator_advances(clips: ClipGenerator) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (clips.sample(2, 4, 32, 32, generator=generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving right", 0, 1), ("moving left", 0, -1), ("moving down", 1, 1), ("moving up", 1, -1)],
)
def test_objects_move_as_the_caption_says(
    clips: ClipGenerator, motion: str, axis: int, sign: int
) -> None:
    video = _render(clips, motion)
    centres = [_centre(frame) for frame in video]
    travel = [sign * (b[axis] - a[axis]) for a, b in pairwise(centres)]
    across = [abs(c[1 - axis] - centres[0][1 - axis]) for c in centres]
    assert min(travel) > 0.5 and max(across) < 0.5


def test_growing_and_shrinking_change_the_area(clips: ClipGenerator) -> None:
    for motion, sign in (("growing", 1), ("shrinking", -1)):
        area = _render(clips, motion).sum((-1, -2))
        assert (sign * area.diff() > 0).all()


def test_later_objects_stand_in_front() -> None:
    sprites = np.zeros((len(OBJECTS), 96, 96, 4), np.uint8)
    sprites[..., 3] = 255
    sprites[list(OBJECTS).index("cat"), ..., 0] = 255
    sprites[list(OBJECTS).index("pig"), ..., 1] = 255
    textures = np.zeros((len(BACKGROUNDS), 256, 256, 3), np.uint8)
    clips = ClipGenerator(SpriteAtlas(sprites, textures))
    scene = Scene((("cat", "growing"), ("pig", "growing")), "stripes", "still camera")
    frame = clips.render([scene], 2, 64, 64, seed=0)[0, :, 1]
    red, green = frame[0] > 0, frame[1] > 0
    assert green.any() and red.any()
    assert not (red & green).any()


def test_an_atlas_for_other_captions_is_refused(tmp_path: Path) -> None:
    SpriteAtlas(np.zeros((3, 96, 96, 4), np.uint8), np.zeros((2, 256, 256, 3), np.uint8)).save(
        tmp_path / "atlas.npz"
    )
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        SpriteAtlas.load(tmp_path / "atlas.npz")
