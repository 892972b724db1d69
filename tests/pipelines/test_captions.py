from __future__ import annotations

import random

import pytest

from dit_sparse.pipelines.captions import (
    CAMERAS,
    HELD_OUT_PROMPTS,
    MAX_WORDS,
    MOTIONS,
    PLAIN_BACKGROUNDS,
    WORDS,
    Scene,
    held_out_scenes,
    is_held_out,
    sample_scene,
    sample_training_scene,
    tokenize,
)


def test_caption_reads_as_english() -> None:
    scene = Scene((("cat", "bouncing"), ("apple", "spinning")), "stripes", "panning left")
    assert scene.caption() == "a cat bouncing and an apple spinning over stripes, panning left"


def test_every_caption_tokenizes_within_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        ids = tokenize(sample_scene(rng).caption())
        assert 0 < len(ids) <= MAX_WORDS
        assert min(ids) >= 2 and max(ids) < len(WORDS) + 2


def test_training_never_sees_a_held_out_scene() -> None:
    rng = random.Random(1)
    assert not any(is_held_out(sample_training_scene(rng)) for _ in range(500))


def test_about_a_tenth_is_held_out() -> None:
    rng = random.Random(2)
    share = sum(is_held_out(sample_scene(rng)) for _ in range(3000)) / 3000
    assert 0.07 < share < 0.13


def test_held_out_prompts_are_held_out_and_fixed() -> None:
    scenes = held_out_scenes(len(HELD_OUT_PROMPTS))
    assert all(is_held_out(scene) for scene in scenes)
    assert tuple(scene.caption() for scene in scenes) == HELD_OUT_PROMPTS
    assert len(set(HELD_OUT_PROMPTS)) == 20


def test_holding_out_ignores_the_order_of_objects() -> None:
    pair = (("cat", "bouncing"), ("pig", "spinning"))
    for background in ("stripes", "grass", "bricks"):
        there = Scene(pair, background, "still camera")
        back = Scene(pair[::-1], background, "zooming in")
        assert is_held_out(there) == is_held_out(back)


def test_a_plain_wall_is_filmed_with_a_still_camera() -> None:
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(500)]
    assert {s.camera for s in scenes if s.background in PLAIN_BACKGROUNDS} == {CAMERAS[0]}
    assert {s.camera for s in scenes} == set(CAMERAS)
    assert {motion for s in scenes for _, motion in s.objects} == set(MOTIONS)


def test_unknown_word_names_itself_and_a_close_one() -> None:
    with pytest.raises(ValueError, match=r"'pandas'.*panda"):
        tokenize("a pandas bouncing over stripes")


def test_punctuation_is_no_part_of_a_word() -> None:
    assert tokenize("A heart, growing over grass!") == tokenize("a heart growing over grass")


def test_too_long_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_WORDS} words"):
        tokenize("a " * (MAX_WORDS + 1))
