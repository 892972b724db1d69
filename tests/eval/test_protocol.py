"""Comparison at equal achieved density: the search, what is measured, and the summary."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dit_sparse import SparseConfig
from dit_sparse.cli import app
from dit_sparse.eval import compare, protocol
from dit_sparse.eval.arms import parse_arms
from dit_sparse.eval.compare import Request
from dit_sparse.eval.metrics import Quality
from dit_sparse.eval.protocol import at_density, bisect_density, sparse_step_density, summarize
from dit_sparse.methods import list_methods


def config(share: float) -> SparseConfig:
    return SparseConfig.from_name("adaspa", sparsity=1 - share)


def share_of(setting: SparseConfig) -> float:
    return 1 - setting.method.sparsity  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.4, 5),
    st.floats(0, 0.1),
    st.floats(0.2, 0.9),
)
def test_any_rising_curve_is_met(power: float, floor: float, target: float) -> None:
    calls = []

    def measure(setting: SparseConfig) -> float:
        calls.append(setting)
        return floor + (1 - floor) * share_of(setting) ** power

    found = bisect_density(config, target, measure)
    assert abs(found.density - target) <= 0.01
    assert found.density == measure(found.config)
    assert len(found.tries) == len(calls) - 1 <= 10
    assert found.tries[0][0] == target
    assert found.target == target


def test_a_budget_that_is_its_density_takes_one_try() -> None:
    found = bisect_density(config, 0.3, lambda setting: share_of(setting) + 0.005)
    assert len(found.tries) == 1


def test_a_method_of_few_densities_gives_the_nearest_and_stops() -> None:
    seen: list[int] = []

    def strided(share: float) -> SparseConfig:
        return SparseConfig.from_name("s2", stride=max(1, round(1 / share)))

    def measure(setting: SparseConfig) -> float:
        seen.append(setting.method.stride)  # type: ignore[attr-defined]
        return 1 / seen[-1]

    found = bisect_density(strided, 0.4, measure)
    assert found.config.method.stride == 2 or found.config.method.stride == 3  # type: ignore
    assert abs(found.density - 0.4) == pytest.approx(min(0.1, 0.4 - 1 / 3))
    # Nothing is measured twice.
    assert len(seen) == len(set(seen)) <= 4


def test_whole_blocks_end_the_search_early() -> None:
    # Of 32 blocks 9 or 10 can be kept; every share gives another configuration all the same.
    found = bisect_density(config, 0.3, lambda setting: round(32 * share_of(setting)) / 32)
    assert found.density in (9 / 32, 10 / 32)
    assert len(found.tries) <= 6


def test_a_target_below_what_a_method_keeps_gives_its_least() -> None:
    found = bisect_density(config, 0.1, lambda setting: max(0.35, share_of(setting)))
    assert found.density == 0.35
    assert len(found.tries) <= 10


@pytest.mark.parametrize(
    "wrong", [{"target": 0.0}, {"target": 1.0}, {"tolerance": 0.0}, {"most_tries": 0}]
)
def test_impossible_searches_are_refused(wrong: dict[str, Any]) -> None:
    options = {"target": 0.3, **wrong}
    with pytest.raises(ValueError, match=r"density|tolerance"):
        bisect_density(config, options.pop("target"), share_of, **options)


def layer(phases: dict[str, int], density: list[float] | None) -> dict[str, Any]:
    return {"phases": phases, "head_density": density}


def test_layers_that_stay_dense_count() -> None:
    sparse = layer({"dense": 2, "refresh": 1, "sparse": 3}, [0.1, 0.3])
    half = layer({"dense": 4, "refresh": 2}, [0.4, 0.4])
    dense = layer({"dense": 6}, None)
    report: Any = SimpleNamespace(layers=[sparse, half, dense])
    assert sparse_step_density(report) == pytest.approx((4 * 0.2 + 2 * 0.4 + 4 * 1.0) / 10)
    assert sparse_step_density(SimpleNamespace(layers=[sparse])) == pytest.approx(0.2)  # type: ignore
    assert sparse_step_density(SimpleNamespace(layers=[dense])) == 1.0  # type: ignore


def test_methods_know_their_budget_or_say_that_they_do_not() -> None:
    known = list_methods()
    for name in ("dense", "full"):
        with pytest.raises(ValueError, match=f"{name}.*no setting for its density"):
            known[name]().at_budget(0.3)
    assert known["adaspa"](block=128).at_budget(0.3) == known["adaspa"](sparsity=0.7, block=128)
    delta = known["compensated_delta"]
    assert delta(period=4).at_budget(0.3) == delta(density=0.3, period=4)


TINY = {"steps": 3, "height": 64, "width": 64, "frames": 4, "device": "cpu"}


def test_arms_are_turned_to_one_density(pipe: Any, tmp_path: Path) -> None:
    # 128 tokens in blocks of 64 hold densities of a half and of one alone.
    request = Request(
        prompts=("a heart", "a star"),
        arms=tuple(parse_arms("noise-floor,adaspa:sparsity=0.1,biformer:warmup=1,dsvt:warmup=1")),
        output=tmp_path,
        **TINY,  # type: ignore[arg-type]
    )
    stages: list[str] = []
    turned, loaded, found = at_density(request, 0.5, pipe=pipe, on_stage=stages.append)
    assert loaded is pipe
    assert [arm.label for arm in turned.arms] == [
        "dense",
        "noise-floor",
        "adaspa:sparsity=0.1@0.500",
        "biformer:warmup=1@0.500",
        "dsvt:warmup=1@0.500",
    ]
    assert set(found) == {"adaspa:sparsity=0.1", "biformer:warmup=1", "dsvt:warmup=1"}
    assert any("adaspa" in stage and "0.500" in stage for stage in stages)
    result = compare.run_comparison(turned, pipe=pipe)
    for run in result.runs[2:5]:
        assert run.sparse_density == pytest.approx(0.5)


def test_an_arm_without_a_budget_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "prepare", lambda *a, **k: pytest.fail("loaded"))
    arms = tuple(parse_arms("adaspa,full:block=128"))
    request = Request(prompts=("a heart",), arms=arms, output=tmp_path, **TINY)  # type: ignore
    with pytest.raises(ValueError, match="no setting for its density"):
        at_density(request, 0.5)


def test_the_command_compares_at_a_density(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_pipeline", lambda *args: pipe)
    sizes = [text for key, value in TINY.items() for text in (f"--{key}", str(value))]
    arguments = ["compare", *sizes, "--output", str(tmp_path), "--at-density", "0.7"]
    arguments += ["--methods", "adaspa", "--prompt", "a heart", "--prompt", "a star"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    # Two blocks cannot keep 70 %.
    assert "nearest to density 0.7" in result.stderr
    assert "All prompts" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    labels = [run["method"] for run in report["runs"]]
    assert labels[0] == "dense"
    assert labels[1].startswith("adaspa@")
    wrong = CliRunner().invoke(app, [*arguments[:-6], "--at-density", "2", "--methods", "adaspa"])
    assert wrong.exit_code == 2
    assert "density" in wrong.stderr


def test_the_worst_case_stands_beside_the_mean() -> None:
    def run(method: str, prompt: str, psnr: float | None, ssim: float = 0.0) -> Any:
        quality = None
        if psnr is not None:
            quality = Quality((psnr,), (ssim,), psnr)
        return SimpleNamespace(method=method, prompt=prompt, quality=quality)

    runs = [
        run("dense", "one", None),
        run("a", "one", 30.0, 0.9),
        run("b", "one", 20.0, 0.7),
        run("dense", "two", None),
        run("a", "two", 10.0, 0.95),
        run("b", "two", 22.0, 0.6),
    ]
    a, b = summarize(runs)
    assert (a.method, a.psnr, a.psnr_worst, a.worst_prompt) == ("a", 20.0, 10.0, "two")
    assert (a.ssim, a.ssim_worst) == (pytest.approx(0.925), 0.9)
    assert (b.method, b.psnr, b.psnr_worst, b.worst_prompt) == ("b", 21.0, 20.0, "one")
