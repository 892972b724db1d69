"""The benchmark of whole transformers: what it adds up, what it refuses, and that it runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.transformers import __main__ as benchmark
from benchmarks.transformers.categories import Profile, category
from benchmarks.transformers.measure import Bench
from benchmarks.transformers.models import MODELS
from benchmarks.transformers.phases import representative, step_phases
from benchmarks.transformers.residuals import settled
from benchmarks.transformers.summary import Floor, Scale, free_attention_limits, total, verdict
from dit_sparse import AdaSpa, SparseConfig
from dit_sparse.methods.compensated_delta import CompensatedDelta

CPU = torch.device("cpu")
OPTIONS = ["--tiny", "--layers", "2", "--methods", "adaspa", "--steps", "12", "--repeats", "1"]


def tiny(name: str) -> Bench:
    return Bench(MODELS[name].shrunk(), 2, CPU, torch.float32, steps=12, repeats=1)


@pytest.mark.parametrize(
    ("name", "tokens", "billions"),
    [
        ("flux-2048", 16_384 + 512, 11.8),
        ("wan-1.3b", 32_760, 1.39),
        ("cogvideox-1.5", 44_880 + 226, 5.55),
        ("wan-14b", 75_600, 14.06),
        ("hunyuanvideo", 118_800 + 256, 12.46),
    ],
)
def test_sizes_are_real(name: str, tokens: int, billions: float) -> None:
    model = MODELS[name]
    assert model.tokens == tokens
    assert model.block_parameters(None) / 1e9 == pytest.approx(billions, rel=5e-3)
    few = model.block_parameters(4)
    assert few / model.block_parameters(None) == pytest.approx(
        sum(model.depths(4).values()) / model.depth
    )


def test_stacks_keep_their_ratio() -> None:
    assert MODELS["hunyuanvideo"].depths(4) == {"num_layers": 2, "num_single_layers": 4}
    assert MODELS["flux-2048"].depths(None) == {"num_layers": 19, "num_single_layers": 38}
    with pytest.raises(ValueError, match="keeps the ratio 20:40"):
        MODELS["hunyuanvideo"].depths(3)
    with pytest.raises(ValueError, match=r"in \[1, 30\]"):
        MODELS["wan-1.3b"].depths(31)


@pytest.mark.parametrize("name", MODELS)
def test_exact_settings_equal_dense_attention_and_dropped_blocks_do_not(name: str) -> None:
    bench = tiny(name)
    methods = (AdaSpa.exact(), CompensatedDelta.exact())
    configs = {method.name: SparseConfig(method) for method in methods}
    rows = bench.check(configs, "_native_math")
    assert all(row.ok for row in rows), rows
    assert rows[-1].what == "dropped blocks show" and rows[-1].error > 1e3 * rows[-1].budget
    assert any(row.what == "padding kept" for row in rows) == bench.model.padded
    # With settings that drop blocks the same comparison fails.
    for method in (AdaSpa(0.5, search=(0,)), CompensatedDelta(0.5, warmup=1)):
        wrong = bench.check({method.name: SparseConfig(method)}, "_native_math")
        assert [row.ok for row in wrong][-3:] == [True, False, True]


def test_phases_of_a_generation() -> None:
    phases = step_phases(MODELS["wan-1.3b"], SparseConfig(AdaSpa()), 50)
    assert Counter(phases) == {"dense": 9, "search": 1, "refresh": 1, "sparse": 39}
    assert representative(phases) == [0, 9, 10, 11, 29, 30, 31]
    delta = step_phases(MODELS["wan-1.3b"], SparseConfig(CompensatedDelta()), 50)
    assert Counter(delta) == {"dense": 9, "search": 1, "sparse": 40}


def test_a_step_of_another_phase_is_refused() -> None:
    with pytest.raises(RuntimeError, match="expected step 0 to be sparse, it was search"):
        tiny("wan-1.3b").sparse(SparseConfig(AdaSpa.exact()), "native", ["sparse"])


def test_sums() -> None:
    scale = Scale(rest_ms=2.0, ratio=10.0)
    assert scale.forward(12.0) == 102.0
    assert scale.line(12.0) == "2.00 + (12.00 - 2.00) x 10 = 102.0 ms"
    found = total({"dense": 10, "sparse": 40}, {"dense": 100.0, "sparse": 50.0}, branches=2)
    assert found.seconds == pytest.approx(6.0)
    assert found.line == "2 x (10 dense x 100.0 + 40 sparse x 50.0) ms = 6.0 s"


def test_limits_without_attention() -> None:
    everywhere, in_sparse = free_attention_limits({"dense": 9, "search": 1, "sparse": 40}, 100, 80)
    assert everywhere == pytest.approx(5.0)
    assert in_sparse == pytest.approx(50 * 100 / (10 * 100 + 40 * 20))


@pytest.mark.parametrize(
    ("goal", "sparse_ms", "attention_ms", "says"),
    [
        (1.5, 50.0, 30.0, "met"),
        # 4000 ms for 50 passes, 10 of them of 100 ms, leave 75 ms for each of 40 sparse ones.
        (1.25, 90.0, 70.0, "a sparse pass may take 75.0 ms and takes 90.0, 70.0 of it"),
        (1.25, 90.0, 70.0, "beyond its density forbids it"),
        (2.6, 50.0, 30.0, "not at this density"),
        (4.0, 50.0, 30.0, "no attention, however fast"),
    ],
)
def test_verdicts(goal: float, sparse_ms: float, attention_ms: float, says: str) -> None:
    counts = {"dense": 10, "sparse": 40}
    forward = {"dense": 100.0, "sparse": sparse_ms}
    reached = 5000 / (1000 + 40 * sparse_ms)
    floor = Floor(100.0, 80.0)
    assert says in verdict(goal, reached, 100.0, counts, forward, attention_ms, 0.2, floor)


@pytest.mark.parametrize(
    ("kernel", "operators", "expected"),
    [
        ("_attention_fwd_kernel", ["dit_sparse::self_attention"], "sparse attention"),
        ("_lists_kernel", ["dit_sparse::self_attention"], "lists and selection"),
        ("_block_mass_fwd_kernel", ["dit_sparse::self_attention"], "mass and summaries"),
        ("gather", ["aten::index_select", "dit_sparse::self_attention"], "reorder"),
        ("elementwise", ["aten::copy_", "dit_sparse::self_attention"], "copies inside"),
        ("elementwise", ["aten::mul", "dit_sparse::self_attention"], "other inside"),
        ("cudnn_sm90_flash", ["aten::_cudnn", "dit_sparse::self_attention"], "dense attention"),
        ("flash_fwd_kernel", ["aten::_flash_attention_forward"], "attention elsewhere"),
        ("nvjet_hsh_128x256", ["aten::addmm"], "linear"),
        ("vectorized_layer_norm", ["aten::native_layer_norm"], "norm"),
        ("elementwise", ["aten::mul"], "elementwise and other"),
    ],
)
def test_categories(kernel: str, operators: list[str], expected: str) -> None:
    assert category(kernel, operators) == expected


def test_shares_of_a_profile() -> None:
    profile = Profile({"linear": 94.0, "reorder": 4.0, "lists and selection": 2.0}, {}, [])
    assert profile.verdicts() == [
        "reorder: 4.0 %, goal below 3 % missed",
        "bookkeeping: 2.0 %, goal below 2 % missed",
    ]


def test_residuals_are_kept_as_at_full_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tiny("wan-1.3b")
    full = 2 * bench.model.block_bytes(bench.transformer)
    one = 256 * 2 * 32 * 4
    residuals = 4 * 2 * one  # four layers, two branches
    where = "benchmarks.transformers.residuals._free_without_blocks"
    # Half of what is left beside weights and one layer's tensors holds all, then half of it.
    for share, precision in ((1.0, "native"), (0.5, "bfloat16")):
        free = full + 4 * one + 2 * share * residuals
        monkeypatch.setattr(where, lambda bench, free=free: int(free))
        method, note = settled(CompensatedDelta(), bench)
        assert (method.precision, method.adapt, method.offload) == (precision, False, False)
        assert note is not None and "4 of 4 layers x 2 branches" in note
    assert settled(AdaSpa(), bench) == (AdaSpa(), None)


def test_results_are_written_kept_and_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    command = [*OPTIONS, "--models", "hunyuanvideo", "--profile", "--output", str(path)]
    assert benchmark.main(command) == 0
    shown = capsys.readouterr().out
    found = json.loads(path.read_text())["models"]["hunyuanvideo"]
    eager = found["eager"]
    dense = {row["arm"]: row for row in eager["dense"]}
    assert set(dense) == {"diffusers", "diffusers, _native_math", "padding trimmed"}
    (sparse,) = eager["sparse"]
    assert {p: part["steps"] for p, part in sparse["phases"].items()} == {
        "dense": 1, "search": 1, "refresh": 1, "sparse": 9,
    }  # fmt: skip
    seconds = 0.0
    for part in sparse["phases"].values():
        rest, measured = eager["rest_ms"], part["measured"]["ms"]
        seconds += part["steps"] * (rest + (measured - rest) * 2) / 1e3
        assert part["attention_ms"] < 2 * measured
    assert sparse["total_s"] == pytest.approx(seconds)
    for name, row in (("diffusers", "diffusers"), ("padding trimmed", "padding trimmed")):
        assert sparse["speedup"][name] == pytest.approx(dense[row]["total_s"] / seconds)
    assert 0.2 < sparse["density"] < 0.5 and sparse["kept_gb"] > 0
    assert set(sparse["verdicts"]) == {"fastest backend", "diffusers"}
    profile = found["profile"]["adaspa"]
    assert profile["by_category"]["linear"] > 0 and profile["total_ms"] > 0
    assert sparse["total"] in shown and "padding trimmed" in shown
    # A second run measures nothing, and a budget that is too small starts nothing.
    assert benchmark.main(command) == 0
    assert "is in" in capsys.readouterr().out
    assert benchmark.main([*command, "--again", "--budget-s", "1"]) == 0
    assert "left out" in capsys.readouterr().out
    assert json.loads(path.read_text())["models"]["hunyuanvideo"] == found


def test_no_speed_where_results_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AdaSpa, "exact", classmethod(lambda cls: cls(0.5, search=(0,))))
    path = tmp_path / "results.json"
    assert benchmark.main([*OPTIONS, "--models", "wan-1.3b", "--output", str(path)]) == 1
    found: dict[str, Any] = json.loads(path.read_text())["models"]["wan-1.3b"]
    assert "eager" not in found and not all(row["ok"] for row in found["checks"])
    assert "no speed is measured" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--models", "sora"], ["--layers", "3"], ["--methods", "none"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse(wrong)
