"""The offline search picks, at equal cost, what changes the output of a head least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.eval import compare
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call
from dit_sparse.methods.mminference import MMInference
from dit_sparse.methods.modality_parts import attend_parts, parts_density
from dit_sparse.methods.pattern_table import Pattern, PatternTable
from dit_sparse.pipelines.observe import observe_step
from dit_sparse.pipelines.search_mminference import (
    _Search,
    all_patterns,
    relative_error,
    search_patterns,
)
from dit_sparse.schedule import Step

METHOD = MMInference(0.5, (0,), strides=("w", "t"))
# Every other frame of eight.
TWO = MMInference(
    0.5,
    (0,),
    strides=("t",),
    modalities=(((0, 64), (128, 192), (256, 320), (384, 448)),),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_cost_the_same(
    run: Callable[[], object], reference: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    run()
    return 1.0, 0.001


def copy_call(call: Call) -> Call:
    """The call without what ties it to its model."""
    dense = call.dense()
    q, k, v = (x.clone() for x in (call.q, call.k, call.v))
    return Call(
        q, k, v, call.layout, call.step, call.layer, call.layers, None, {}, None, "auto",
        lambda with_lse: (dense, None),
    )  # fmt: skip


@pytest.fixture
def calls(tiny_pipe: Any, arguments: dict[str, Any]) -> list[Call]:
    """The calls of the step that searches look at."""
    found: list[Call] = []
    noise = torch.Generator().manual_seed(0)
    sample = {**arguments, "generator": noise}
    observe_step(tiny_pipe, 1, lambda call: found.append(copy_call(call)), sample)
    return found


@pytest.mark.parametrize("method", [METHOD, TWO], ids=["video", "references"])
def test_heads_get_the_best_candidate_and_its_error(
    tiny_pipe: Any,
    arguments: dict[str, Any],
    calls: list[Call],
    method: MMInference,
    tmp_path: Path,
) -> None:
    layers: list[tuple[int, int]] = []
    table = search_patterns(
        tiny_pipe,
        method,
        arguments,
        measure=all_cost_the_same,
        on_layer=lambda done, total: layers.append((done, total)),
    )
    assert layers == [(1, 2), (2, 2)]
    assert (table.layers, table.heads, table.dim) == (2, 2, 16)
    assert table.modalities == (2 if method is TWO else 1)
    assert {pattern.density for pattern in table.patterns} == {0.5}
    path = tmp_path / "table.json"
    table.save(path)
    by_table = MMInference(
        0.5, (0,), strides=method.strides, modalities=method.modalities, table=str(path)
    )
    for call in calls:
        dense, memory = call.dense(), {}
        for index in range(2):
            call.memory, call.step = memory, Step(index, 3, index / 3, "cond", 0)
            out = by_table.attend(call)
        errors = torch.tensor([choice.error for choice in table.choices[call.layer]])
        torch.testing.assert_close(relative_error(out, dense), errors, atol=1e-4, rtol=0)
        assert errors.max() > 1e-3
        # No other pattern, on all pairs alike, is better.
        for pattern in all_patterns(method.strides):
            given = [[Pattern(pattern.kind, pattern.stride, pattern.lines, 0.5)] * 2]
            parts = method.parts(call, "none", None, given)
            assert (relative_error(attend_parts(call, parts), dense) >= errors - 1e-4).all()


def test_costly_candidates_are_dropped(tiny_pipe: Any, arguments: dict[str, Any]) -> None:
    def slow(run: Any, reference: Any, device: torch.device) -> tuple[float, float]:
        return 10.0, 0.001

    table = search_patterns(tiny_pipe, METHOD, arguments, measure=slow)
    assert [pattern.kind for pattern in table.patterns] == ["a-shape"]
    dropped = [c for c in table.provenance["candidates"] if c["cost"] is None]
    assert len(dropped) == len(all_patterns(METHOD.strides)) - 1


def test_candidates_that_cost_more_get_less_density(
    tiny_pipe: Any, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def density(call: Call, parts: Any) -> float:
        return float(parts_density(parts, 2, call.layout.tokens).mean())

    def twice_as_slow(run: Any, reference: Any, device: torch.device) -> tuple[float, float]:
        return 2 * run() / reference(), 0.001

    monkeypatch.setattr("dit_sparse.pipelines.search_mminference.attend_parts", density)
    table = search_patterns(tiny_pipe, METHOD, arguments, measure=twice_as_slow)
    reference, *others = table.provenance["candidates"]
    assert reference["pattern"]["density"] == 0.5 and reference["cost"] == 1.0
    kept = [c for c in others if c["cost"] is not None]
    assert len(kept) > 5
    for candidate in kept:
        assert candidate["cost"] <= 1.05
        assert candidate["pattern"]["density"] < 0.35


def planted_call(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> Call:
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    return Call(
        q, k, v, layout, Step(0, 2, 0.0, "cond", 0), 0, 1, None, {}, None, "auto",
        lambda with_lse: (dense, None),
    )  # fmt: skip


def test_planted_heads_are_found() -> None:
    layout = TokenLayout((4, 8, 16))
    rng = torch.Generator().manual_seed(0)
    q, k = (0.3 * torch.randn(1, 512, 2, 32, generator=rng) for _ in range(2))
    coords, axes = layout.coords(), torch.eye(32)
    # Head 0: the own column. Head 1: column 3, and queries in column 3 look at everything.
    q[0, :, 0], k[0, :, 0] = 60 * axes[coords[:, 2]], axes[coords[:, 2]]
    q[0, :, 1, 0], k[0, :, 1, 0] = 30.0 * (coords[:, 2] != 3), 4.0 * (coords[:, 2] == 3)
    search = _Search(MMInference(0.7, (0,), strides=("t", "w", "h")), all_cost_the_same, None)
    search.observe(planted_call(q, k, layout))
    table = search.table({"model": "planted"})
    own, third = (table.patterns[choice.patterns[0]] for choice in table.choices[0])
    # A block holds two columns, so the diagonal that all grids keep is their slash lines.
    assert (own.kind, own.stride) == ("grid", "w")
    assert (third.kind, third.stride) == ("grid", "w") and "h" in third.lines
    assert max(choice.error for choice in table.choices[0]) < 0.02
    assert table.provenance["sample"]["grid"] == [4, 8, 16]


def test_planted_pairs_of_modalities_are_found() -> None:
    # References look at their own row of everything, the others at one column of the references.
    layout = TokenLayout((4, 16, 16))
    coords, axes = layout.coords(), torch.eye(32)
    reference = (coords[:, 0] == 0) | (coords[:, 0] == 3)
    rng = torch.Generator().manual_seed(0)
    q, k = (0.1 * torch.randn(1, 1024, 1, 32, generator=rng) for _ in range(2))
    k[0, :, 0] += axes[coords[:, 1]]
    k[0, :, 0, 20] += 1.0 * ((coords[:, 2] == 5) & reference)
    q[0, :, 0] += torch.where(reference[:, None], 60 * axes[coords[:, 1]], 60 * axes[20])
    modalities = (((0, 256), (768, 1024)),)
    method = MMInference(0.6, (0,), strides=("h", "w"), modalities=modalities)
    search = _Search(method, all_cost_the_same, None)
    search.observe(planted_call(q, k, layout))
    table = search.table({})
    (choice,) = table.choices[0]
    assert choice.boundary == "2d" and choice.error < 0.02
    strides = [table.patterns[index].stride for index in choice.patterns]
    # References to references and to others, others to references; nothing to others.
    assert strides[:3] == ["h", "h", "w"]


def test_a_step_that_skips_layers_makes_no_table() -> None:
    search = _Search(METHOD, all_cost_the_same, None)
    search.facts, search.sample = {"layers": 3, "heads": 1, "dim": 1, "modalities": 1}, {}
    search.choices = {0: [], 2: []}
    with pytest.raises(ValueError, match=r"layers \[1\] made no self-attention call"):
        search.table({})


@pytest.mark.parametrize("step", [-0.1, 1.0])
def test_shares_beyond_the_steps_are_refused(tiny_pipe: Any, step: float) -> None:
    with pytest.raises(ValueError, match="share of the steps"):
        search_patterns(tiny_pipe, METHOD, {"num_inference_steps": 3}, step=step)


def test_the_command_writes_a_table_that_compare_reads(
    tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "load_pipeline", lambda *args: tiny_pipe)
    size = ["--steps", "3", "--height", "64", "--width", "64", "--frames", "8", "--device", "cpu"]
    path, runner = tmp_path / "table.json", CliRunner()
    method = "mminference:sparsity=0.5:strides=('t',)"
    arguments = [*size, "--prompt", "a heart", "--method", method, "--output", str(path)]
    result = runner.invoke(app, ["search-mminference", *arguments])
    assert result.exit_code == 0, result.output
    assert "4 heads" in result.stdout and "table.json" in result.stdout
    table = PatternTable.load(path)
    assert table.provenance["model"] == "embedded"
    assert table.provenance["arguments"]["prompt"] == "a heart"
    assert table.provenance["step"] == 1
    assert {"machine", "created", "candidates", "search_seconds"} <= set(table.provenance)
    for count, options in ((1, [*size, "--prompt", "a star"]), (0, [])):
        entry = f"{method}:table={path}" if count else f"mminference:table={path}"
        out = ["--methods", entry, "--output", str(tmp_path / f"out{count}")]
        result = runner.invoke(app, ["compare", *options, *out], env={"COLUMNS": "300"})
        assert (result.exit_code == 0) == bool(count), result.output
        assert count or "was searched with" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "adaspa"], "--method mminference"),
        (["--method", "mminference:dense_layers=(0,)"], "dense_layers"),
        (["--method", "mminference:sparsity=2"], "sparsity"),
        (["--frames", "15"], "even number"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("the pipeline was loaded")

    monkeypatch.setattr(compare, "load_pipeline", load)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["search-mminference", "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
