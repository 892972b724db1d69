"""`dit-sparse search` from the command line to a plan that a generation follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse import enable_sparse_attention
from dit_sparse.cli import app
from dit_sparse.cli_search import _weights_digest
from dit_sparse.eval import compare
from dit_sparse.methods.plan import load_plan
from dit_sparse.pipelines import search as search_module

runner = CliRunner()
SIZE = ["--steps", "2", "--height", "64", "--width", "64", "--frames", "8", "--device", "cpu"]
QUICK = [*SIZE, "--cost", "nominal", "--density", "0.25", "--shifts", "1", "--prompt", "a heart"]


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> Any:
    monkeypatch.setattr(compare, "load_pipeline", lambda *args: pipe)
    return pipe


def search(path: Path, *options: str) -> Any:
    result = runner.invoke(app, ["search", *QUICK, "--output", str(path), *options])
    assert result.exit_code == 0, result.output
    return result


def test_a_plan_is_written_and_followed(tiny_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = search(path, "--target-cost", "0.5", "--guidance-scale", "2")
    for text in ("multi_diagonal 0.25", "mean cost", "plan.json"):
        assert text in result.stdout
    plan = load_plan(path)
    assert (plan.grid, plan.layers, plan.heads, plan.dim) == ((4, 8, 8), 2, 2, 16)
    assert (plan.model.kind, plan.block, len(plan.steps)) == ("WanTransformer3DModel", 64, 2)
    assert {step.component for step in plan.steps} == {"transformer"}
    told = plan.provenance
    assert told["search"]["mean_cost"] <= 0.5
    assert (told["captions"], told["seed"], told["guidance_scale"]) == (["a heart"], 0, 2.0)
    assert (
        told["scheduler"] | {"class": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
        == (told["scheduler"])
    )
    assert {"cpu", "torch", "diffusers", "dit_sparse"} <= set(told["machine"])
    assert told["command"].startswith("dit-sparse ")
    assert told["weights"] == {"transformer": _weights_digest(tiny_model.transformer)}
    noise = tiny_model.scheduler.sigmas[:2]
    assert [s.progress for s in plan.steps] == [round(1 - float(n), 6) for n in noise]

    for steps in (2, 5):
        with enable_sparse_attention(tiny_model, "sparse_vdit", plan=str(path)) as sparse:
            tiny_model(
                "a star", num_frames=8, height=64, width=64, num_inference_steps=steps,
                guidance_scale=1.0, generator=torch.Generator().manual_seed(1),
                output_type="latent",
            )  # fmt: skip
            report = sparse.report()
        phases = {(layer["layer"], tuple(layer["phases"].items())) for layer in report.layers}
        rows = [
            plan.step_at(1 - float(sigma)).table[layer]
            for sigma in tiny_model.scheduler.sigmas[:steps]
            for layer in range(2)
        ]
        sparse_calls = sum(any(row) for row in rows)
        assert sum(dict(p).get("sparse", 0) for _, p in phases) == sparse_calls > 0

    with (
        enable_sparse_attention(tiny_model, "sparse_vdit", plan=str(path)),
        pytest.raises(ValueError, match=r"searched at \(4, 8, 8\)"),
    ):
        tiny_model("a star", num_frames=8, height=64, width=128, num_inference_steps=1)


def test_the_search_leaves_the_model_as_it_was(tiny_model: Any, tmp_path: Path) -> None:
    before = list(tiny_model.transformer.attn_processors.values())
    search(tmp_path / "plan.json")
    after = list(tiny_model.transformer.attn_processors.values())
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_the_same_command_goes_on_and_other_settings_need_another_state(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    search(path)
    first = load_plan(path)
    monkeypatch.setattr(
        type(tiny_model), "__call__", lambda *_, **__: pytest.fail("generated again")
    )
    result = search(path)
    assert "going on from" in result.stderr
    assert load_plan(path).steps == first.steps
    # Another budget over the same measurements.
    search(path, "--strategy", "stored", "--target-cost", "0.9")
    result = runner.invoke(app, ["search", *QUICK, "--output", str(path), "--seed", "1"])
    assert result.exit_code == 2
    assert "differs in seed" in " ".join(result.stderr.split())


def test_compare_takes_a_plan_as_an_option(tiny_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    search(path)
    arguments = ["compare", *SIZE, "--prompt", "a heart", "--output", str(tmp_path / "out")]
    methods = f"sparse_vdit:plan={path},sparse_vdit:mode=diagonal:density=0.25"
    result = runner.invoke(app, [*arguments, "--methods", methods])
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    assert runs[1]["config"]["method"]["plan"] == str(path)
    assert runs[2]["density"] < 1
    missing = runner.invoke(app, [*arguments, "--methods", "sparse_vdit:plan=none.json"])
    assert missing.exit_code == 2 and "no such file" in " ".join(missing.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-cost", "2"], "target cost must be in"),
        (["--epsilon", "1"], "epsilon goes with a lambda"),
        (["--mode", "window"], "mode must be one of"),
        (["--cost", "flops"], "cost must be one of"),
        (["--strategy", "best"], "strategy must be one of"),
        (["--block", "32"], "block must be 64 or 128"),
        (["--density", "0"], "density in (0, 1]"),
        (["--frames", "7"], "even number"),
        (["--model", "org/name", "--prompt", ""], "non-empty prompt"),
    ],
)
def test_errors_come_before_anything_is_loaded(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_pipeline", lambda *_: pytest.fail("loaded"))
    path = tmp_path / "plan.json"
    result = runner.invoke(app, ["search", *SIZE, "--output", str(path), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not path.exists()


def test_another_model_needs_captions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "load_pipeline", lambda *_: pytest.fail("loaded"))
    path = str(tmp_path / "plan.json")
    result = runner.invoke(app, ["search", "--model", "org/name", "--output", path])
    assert result.exit_code == 2 and "expected --prompt" in result.stderr


def test_an_unreachable_target_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    arguments = [*QUICK, "--output", str(tmp_path / "plan.json"), "--mode", "diagonal"]
    result = runner.invoke(app, ["search", *arguments, "--target-cost", "0.01"])
    assert result.exit_code == 2
    assert "expected a target cost of at least" in " ".join(result.stderr.split())


def test_help_describes_the_plan() -> None:
    result = runner.invoke(app, ["search", "--help"])
    assert result.exit_code == 0
    for key in ("format", "grid", "modes[]", "steps[]", "progress", "component", "provenance"):
        assert key in result.stdout


def test_searching_needs_a_supported_transformer() -> None:
    with pytest.raises(ValueError, match="expected a diffusers pipeline or transformer"):
        search_module.search(
            object(),
            lambda *_: None,
            ("a",),
            search_module.SearchSettings(price=0.1),
            search_module.SearchState(None, {}),
        )


def test_a_named_kernel_is_checked_and_used(tiny_model: Any) -> None:
    with enable_sparse_attention(tiny_model, "sparse_vdit", mode="skip", impl="cpu") as sparse:
        tiny_model("a star", num_frames=8, height=64, width=64, num_inference_steps=1)
        assert set(sparse.report().kernels) == {"cpu"}
    with pytest.raises(ValueError, match="impl must be"):
        enable_sparse_attention(tiny_model, "sparse_vdit", mode="skip", impl="gpu")
