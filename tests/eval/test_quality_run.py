"""Evidence runs on a tiny pipeline: rows, densities, budget, continuation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import main, parse_arguments, run, settings_of
from benchmarks.quality_arms import parse_line
from benchmarks.quality_estimate import dry_run
from benchmarks.quality_evidence import Evidence
from benchmarks.quality_run import Bench, OutOfBudget, Setting
from benchmarks.worst_clips import frames_path, load

SETTING = Setting(4, 128, 128, 4, 1.0, ("a heart", "a star", "a heart star"), 2, 0, "float32", 2)


def labels(*lines: str) -> list[Any]:
    return [parse_line(line, SETTING.grid) for line in lines]


@pytest.fixture
def bench(pipe: Any) -> Bench:
    pipe.set_progress_bar_config(disable=True)
    return Bench(pipe, SETTING)


def rows_of(evidence: Evidence) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in evidence.data["rows"]}


def test_rows_of_a_run(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arms = labels(
        "noise-floor",
        "adaspa@0.5 show",
        "biformer@=adaspa@0.5 captions=2",
        "fbcache:threshold=10",
        "taylorseer:interval=2",
        "magcache:threshold=10+adaspa",
        "adaspa@=nothing",
        "sparse_vdit",
        "sparse_vdit:plan=embedded-9x9x9",
    )
    run(bench, Evidence.open(path, SETTING, "cpu"), arms, 4)
    # What is in the file, not in memory.
    evidence = Evidence.open(path, SETTING, "cpu")
    rows = rows_of(evidence)

    adaspa = rows["adaspa@0.5"]
    assert len(adaspa["psnr"]) == len(adaspa["ssim"]) == adaspa["captions"] == 3
    assert len(adaspa["seconds"]) == 2 and len(adaspa["batch_seconds"]) == 2
    assert abs(adaspa["sparse_density"] - adaspa["target"]) < 0.07
    assert adaspa["density"] > adaspa["sparse_density"]
    assert adaspa["config"]["method"]["sparsity"] == pytest.approx(1 - adaspa["tries"][-1][0])
    assert 10 < min(adaspa["psnr"]) < 100 > adaspa["psnr_min"][0]
    assert adaspa["dense_seconds"] == rows["dense"]["seconds"]

    same = rows["biformer@=adaspa@0.5"]
    assert len(same["psnr"]) == 2 and same["target"] == adaspa["density"]
    assert same["density"] == pytest.approx(adaspa["density"], abs=0.07)

    # Decides for a batch as a whole: one by one, each timed, against dense clips made likewise.
    cached = rows["fbcache:threshold=10"]
    assert cached["batch"] == 1 and len(cached["seconds"]) == 3 and "batch_seconds" not in cached
    assert min(rows["dense, one by one"]["psnr"]) > 80
    assert min(rows["noise-floor"]["psnr"]) > 80 > max(cached["psnr"])
    assert len(evidence.data["magcache_ratios"]) == 4
    assert rows["magcache:threshold=10+adaspa"]["kernels"]

    assert "no plan" in rows["sparse_vdit"]["error"]
    reasons = {skip["arm"]: skip["reason"] for skip in evidence.data["skipped"]}
    assert "embedded-9x9x9" in reasons["sparse_vdit:plan=embedded-9x9x9"]
    assert "nothing" in reasons["adaspa@=nothing"]

    [worst] = load(frames_path(path))
    assert worst.arm == "adaspa@0.5" and worst.psnr == min(adaspa["psnr"])
    assert worst.caption == SETTING.captions[adaspa["psnr"].index(worst.psnr)]
    assert worst.dense.shape == worst.sparse.shape == (128, 128, 3)


def test_a_run_is_continued(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "result.json"
    run(bench, Evidence.open(path, SETTING, "cpu"), labels("adaspa", "sparse_vdit"), 4)
    first = rows_of(Evidence.open(path, SETTING, "cpu"))
    run(bench, Evidence.open(path, SETTING, "cpu"), labels("adaspa", "biformer"), 4)
    evidence = Evidence.open(path, SETTING, "cpu")
    second = rows_of(evidence)
    assert second["adaspa"] == first["adaspa"] and "psnr" in second["biformer"]
    assert len(evidence.data["sessions"]) == 2
    capsys.readouterr()
    assert dry_run(labels("adaspa", "gna"), SETTING, evidence, 4) > 0
    printed = capsys.readouterr().out
    assert "done  adaspa" in printed and "s  gna" in printed

    other = Setting(4, 128, 128, 5, 1.0, SETTING.captions, 2, 0, "float32", 2)
    with pytest.raises(ValueError, match="settings"):
        Evidence.open(path, other, "cpu")
    data = json.loads(path.read_text())
    data["machine"]["gpu"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="another"):
        Evidence.open(path, SETTING, "cpu")


def test_the_budget_ends_a_run(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    late = Bench(pipe, SETTING, deadline=time.perf_counter() - 1)
    run(late, Evidence.open(path, SETTING, "cpu"), labels("adaspa"), 4)
    assert [skip["arm"] for skip in json.loads(path.read_text())["skipped"]] == ["adaspa"]

    bench = Bench(pipe, SETTING)
    bench.dense_row()
    bench.deadline = time.perf_counter() - 1
    with pytest.raises(OutOfBudget):
        bench.run(parse_line("adaspa", SETTING.grid), None)

    # Dense fits, an arm that is expected to take longer than what is left does not.
    bench = Bench(pipe, SETTING)
    dense = bench.dense_row()
    clip_s = min(dense["seconds"])
    bench.deadline = time.perf_counter() + 8.5 * clip_s
    run(bench, evidence := Evidence.open(None, SETTING, "cpu"), labels("adaspa"), 4)
    assert "more than is left" in evidence.data["skipped"][0]["reason"]


def test_several_settings_have_a_file_each(capsys: Any, tmp_path: Path) -> None:
    command = ["--arms", "adaspa@0.2", "--size", "4x64x64,4x128x128", "--steps", "8,4"]
    output = str(tmp_path / "{tokens}-{steps}.json")
    found = settings_of(parse_arguments([*command, "--output", output]))
    names = [path.name for _, path in found if path is not None]
    assert names == ["128-8.json", "128-4.json", "512-8.json", "512-4.json"]
    assert [len(setting.captions) for setting, _ in found] == [20] * 4
    with pytest.raises(ValueError, match="tokens"):
        settings_of(parse_arguments([*command, "--output", "one.json"]))
    main([*command, "--output", output, "--dry-run"])
    assert capsys.readouterr().out.count("s  adaspa@0.2") == 4
