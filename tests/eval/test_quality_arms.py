"""Arms of evidence runs: what the files say, and which arms may share a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality_arms import BATCH_WIDE_METHODS, parse_line, read_arms
from benchmarks.quality_results import read_claims
from benchmarks.step_caches import switched_on
from dit_sparse.methods import list_methods

FOLDER = Path("benchmarks/arms")
FILES = ("main", "mission", "others", "own", "caches", "steps")
GRID = (8, 32, 32)


@pytest.mark.parametrize("grid", [GRID, (16, 32, 32), (8, 16, 16)])
@pytest.mark.parametrize("name", FILES)
def test_every_file_can_be_read(name: str, grid: tuple[int, int, int]) -> None:
    arms = read_arms(str(FOLDER / f"{name}.txt"), grid)
    assert len({arm.label for arm in arms}) == len(arms) > 10
    assert all(arm.method or arm.cache or arm.missing for arm in arms)
    # What an arm is brought to must have been measured before.
    for i, arm in enumerate(arms):
        if isinstance(arm.target, str):
            assert arm.target in [earlier.label for earlier in arms[:i]]


def test_what_matters_most_is_in_the_other_files_too() -> None:
    main, *others = (
        {arm.label for arm in read_arms(f"{FOLDER / name}.txt", GRID)}
        for name in ("main", "mission", "own", "caches")
    )
    assert main <= set().union(*others)


def test_files_are_joined_and_repeats_dropped() -> None:
    text = ",".join(str(FOLDER / f"{name}.txt") for name in FILES)
    arms = read_arms(text, GRID)
    assert [arm.label for arm in arms].count("noise-floor") == 1
    named = {arm.label.partition(":")[0].partition("@")[0] for arm in arms if "+" not in arm.label}
    assert {*list_methods()} - {"dense", "full"} <= named


def test_every_claim_compares_arms_that_are_run() -> None:
    grid = "x".join(map(str, GRID))
    labels = {arm.label for name in FILES for arm in read_arms(f"{FOLDER / name}.txt", GRID)}
    for better, worse, text in read_claims(FOLDER / "claims.txt"):
        densities = ["0.05", "0.1", "0.2", "0.3"] if "{d}" in better else [""]
        pairs = [
            {x.replace("{d}", d).replace("{grid}", grid) for x in (better, worse)}
            for d in densities
        ]
        assert any(pair <= labels for pair in pairs), text


def test_what_a_line_says() -> None:
    arm = parse_line("adaspa:block=128@0.1 captions=6 show", GRID)
    assert arm.method is not None and arm.method.config.method.block == 128  # type: ignore
    assert (arm.label, arm.target, arm.captions, arm.show) == ("adaspa:block=128@0.1", 0.1, 6, True)
    both = parse_line("magcache:threshold=0.1+compensated_delta:density=0.2", GRID)
    assert both.cache == ("magcache", 0.1) and both.method is not None
    same = parse_line("adaspa@=compensated_delta:density=0.2", GRID)
    assert same.target == "compensated_delta:density=0.2"


@pytest.mark.parametrize(
    "line",
    [
        "adaspa@1.5",
        "adaspa@much",
        "adaspa captions=0",
        "adaspa captions=many",
        "adaspa fast",
        "adaspa:sparse=0.1",
        "fbcache:interval=2",
        "fbcache:threshold=0.1+fbcache:threshold=0.2",
        "fbcache:threshold=0.1@0.2",
        "adaspa+biformer",
        "noise-floor@0.2",
        "sparse_vdit:plan=embedded-8x16x16@0.2",
        "dense",
        "nothing",
    ],
)
def test_a_line_that_says_nothing_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        parse_line(line, GRID)


def test_a_file_that_is_not_there_is_named() -> None:
    plan = parse_line("sparse_vdit:plan=embedded-{grid}", (3, 5, 7))
    assert plan.missing is not None and "embedded-3x5x7" in plan.missing
    assert parse_line("sparse_vdit:plan=embedded-{grid}", (8, 16, 16)).missing is None
    table = parse_line("mminference:table=no/such.json", GRID)
    assert table.missing is not None and "no/such.json" in table.missing


def test_arms_that_decide_for_a_whole_batch_run_alone() -> None:
    def single(line: str) -> bool:
        return parse_line(line, GRID).is_single

    assert single("fbcache:threshold=0.1") and single("fbcache:threshold=0.1+adaspa")
    assert single("moa@0.2") and single("compensated_delta:fade=true")
    assert not any(map(single, ("magcache:threshold=0.1", "taylorseer:interval=2", "adaspa")))


def _batch_gap(pipe: Any, line: str) -> float:
    """How far two clips of a batch are from the same two alone."""

    def generate(prompts: list[str], first: int) -> torch.Tensor:
        with switched_on(pipe, None, parse_line(line, (2, 16, 16)).method.config):  # type: ignore
            return pipe(
                prompts,
                height=128,
                width=128,
                num_frames=4,
                num_inference_steps=3,
                guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(first + i) for i in range(len(prompts))],
                output_type="latent",
            ).frames

    both = generate(["a heart", "a star"], 0)
    alone = torch.cat([generate(["a heart"], 0), generate(["a star"], 1)])
    return float((both - alone).abs().max())


def test_the_others_treat_a_clip_in_a_batch_like_one_alone(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    special = {"sparse_vdit": "sparse_vdit:mode=diagonal", "flexprefill": "flexprefill:block=64"}
    gaps = {
        name: _batch_gap(pipe, special.get(name, name))
        for name in list_methods()
        if name not in ("dense", "full", *BATCH_WIDE_METHODS)
    }
    assert max(gaps.values()) < 1e-5, gaps


@pytest.mark.parametrize(
    "line", ["hyperattention", "compensated_delta:warmup=1:refresh=rows:fade=true"]
)
def test_those_that_run_alone_would_not(pipe: Any, line: str) -> None:
    assert _batch_gap(pipe, line) > 1e-5
