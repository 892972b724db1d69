"""Prompts shared among processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_emoji import tiny_pipeline
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.eval import compare
from dit_sparse.eval.ranks import Ranks

HERE = Path(__file__).parent
PROMPTS = ("a heart", "a star", "a heart a star")


def arguments(folder: Path) -> list[str]:
    """A comparison of three prompts on a tiny model."""
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    sizes = ["--steps", "4", "--height", "32", "--width", "32", "--frames", "4", "--device", "cpu"]
    methods = ["--methods", "adaspa:sparsity=0.5"]
    return ["compare", "--output", str(folder), *methods, "--json", *sizes, *prompts]


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    """The comparison by two processes."""
    # --multi_gpu: for what it knows to be CPUs it would want MPI. Without a GPU gloo is taken.
    two = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    defaults = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *two, *defaults]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    return subprocess.run(
        [*launcher, str(HERE / "share_prompts.py"), *arguments(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_prompts_are_shared_and_the_first_process_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = launch(tmp_path / "several")
    assert several.returncode == 0, several.stderr
    monkeypatch.setattr(compare, "load_pipeline", lambda *options: tiny_pipeline())
    one = CliRunner().invoke(app, arguments(tmp_path / "one"))
    assert one.exit_code == 0, one.output
    # The gloo of torch 2.9 says on the standard output whom it is connected to.
    printed = [done.stdout[done.stdout.index("{\n") :] for done in (several, one)]
    reports = [json.loads(text) for text in printed]
    assert reports[0] == json.loads((tmp_path / "several" / "report.json").read_text())
    assert [report["machine"]["processes"] for report in reports] == [2, 1]
    kept = ("prompt", "method", "density", "dense_steps", "video")
    rows = [[[run[key] for key in kept] for run in report["runs"]] for report in reports]
    assert rows[0] == rows[1]
    # This process may compute with more threads than those, which add in another order.
    sparse = [[run for run in report["runs"] if run["method"] != "dense"] for report in reports]
    for several_run, run in zip(*sparse, strict=True):
        for key in ("psnr_mean", "ssim"):
            assert float(several_run[key]) == pytest.approx(float(run[key]), rel=1e-3)
    assert [row[0] for row in rows[0]] == [prompt for prompt in PROMPTS for _ in range(2)]
    for folder in ("several", "one"):
        clips = sorted(path.name for path in (tmp_path / folder / "videos").iterdir())
        assert len(clips) == 9
        assert (tmp_path / folder / "report.html").is_file()
    # Only the first process talks.
    assert several.stderr.count("prompt(s) x 2 arms") == 1


def test_shares() -> None:
    items = ["a", "b", "c", "d", "e"]
    shares = [Ranks(index, 2).own(items) for index in range(2)]
    assert shares == [[(0, "a"), (2, "c"), (4, "e")], [(1, "b"), (3, "d")]]
    assert Ranks(2, 4).own(items[:2]) == []
    assert Ranks().own(items) == list(enumerate(items))
    assert Ranks().gather(items) is items and Ranks().from_first(items) is items


def test_places(monkeypatch: Any) -> None:
    assert Ranks(3, 4, local=1).place("cuda") == "cuda:1"
    assert Ranks(3, 4, local=1).place("cpu") == "cpu"
    assert Ranks().place("cuda") == "cuda"
    assert Ranks.started("cuda:1") == Ranks()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="gives each its own GPU, got 'cuda:1'"):
        Ranks.started("cuda:1")
