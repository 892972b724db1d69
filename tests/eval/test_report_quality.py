"""Pages made from evidence: answers, tables, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality_results import Result, Row, read_claims
from benchmarks.report_quality import main
from benchmarks.worst_clips import WorstClip, frames_path, keep, load, write_sheet


def row(arm: str, psnr: list[float], seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "psnr": psnr,
        "ssim": [0.9] * len(psnr),
        "seconds": [seconds, seconds, 9 * seconds],
        "batch_seconds": [seconds, seconds / 2],
        "dense_seconds": [2.0],
        "dense_batch_seconds": [3.0, 1.5],
        "density": 0.4,
        "sparse_density": 0.2,
        **more,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    base = [30.0, 34.0, 38.0, 31.0, 36.0]
    rows = [
        {"arm": "dense", "seconds": [2.0], "batch_seconds": [1.0], "density": 1.0},
        row("noise-floor", [55.0, 54.0, 56.0, 55.0, 57.0], 2.0),
        row("adaspa@0.2", base, 1.0, target=0.2),
        row("sparse_vdit:mode=diagonal:warmup=0.2@0.2", [x - 2 for x in base[:4]], 0.9, target=0.2),
        row("mminference@0.2", [x + 1 for x in base], 1.5, target=0.2),
        row("gna:block=64:warmup=0.2@0.2", [31.0, 33.0, 39.0, 30.0, 36.0], 1.2, target=0.2,
            sparse_density=0.25),
        row("compensated_delta", [40.0] * 5, 1.1),
        row("magcache:threshold=0.1", [35.0] * 5, 0.5),
        row("magcache:threshold=0.2", [25.0] * 5, 0.25),
        {"arm": "moa@0.2", "error": "ValueError: no"},
    ]  # fmt: skip
    data = {
        "schema": 2,
        "machine": {"gpu": "Some GPU", "cpu": "some CPU", "torch": "2.11"},
        "settings": {"frames": 16, "height": 256, "width": 256, "steps": 30, "tokens": 8192,
                     "compiled": False,
                     "grid": [8, 32, 32], "guidance": 3.0, "captions": ["a"] * 5, "batch": 2,
                     "dtype": "bfloat16"},
        "remark": "Something to know.",
        "sessions": [{"dense_seconds": [2.0, 2.2], "dense_seconds_after": [2.5]}, {"arms": 0}],
        "skipped": [{"arm": "adaspa@0.1", "reason": "no time left"}],
        "rows": rows,
    }  # fmt: skip
    target = tmp_path / "evidence.json"
    target.write_text(json.dumps(data))
    return target


def test_answers(path: Path) -> None:
    claims = [
        ("adaspa@{d}", "sparse_vdit:mode=diagonal:warmup=0.2@{d}", "diagonal"),
        ("adaspa@{d}", "mminference@{d}", "mminference"),
        ("adaspa@{d}", "gna:block=64:warmup=0.2@{d}", "gna"),
        ("compensated_delta", "moa@{d}", "moa"),
        ("compensated_delta", "nobody asked for this", "unknown"),
    ]
    found = {verdict.text: verdict for verdict in Result.load(path).verdicts(claims)}
    diagonal = found["diagonal of 0.2"]
    assert (diagonal.answer, diagonal.clips) == ("yes", 4)
    assert diagonal.difference is not None and diagonal.difference.mean == pytest.approx(2)
    assert found["mminference of 0.2"].answer == "no"
    assert found["gna of 0.2"].answer == "not separated"
    assert found["moa of 0.2"].answer == "not measured"
    assert "unknown" not in found


def test_series_and_families() -> None:
    def of(arm: str) -> tuple[str, str]:
        found = Row({"arm": arm})
        return found.series, found.family

    assert of("adaspa@0.1") == of("adaspa@0.2") == of("adaspa:sparsity=0.8") == ("adaspa", "adaspa")
    assert of("compensated_delta:density=0.1:warmup=3")[0] == "compensated_delta:warmup=3"
    assert of("compensated_delta:warmup=3:density=0.1")[0] == "compensated_delta:warmup=3"
    assert of("magcache:threshold=0.1+adaspa") == ("magcache+adaspa", "magcache+adaspa")
    assert of("adaspa@=compensated_delta")[0] != "adaspa"


def test_the_front_holds_what_nobody_beats(path: Path) -> None:
    front = [row.arm for row in Result.load(path).front("seconds")]
    assert front == ["magcache:threshold=0.2", "magcache:threshold=0.1", "compensated_delta"]


def test_the_page(path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        dense, sparse = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
        keep(frames_path(path), WorstClip(f"arm {i % 2}", "a heart", 20.0 + i, dense, sparse))
    kept = load(frames_path(path))
    assert [(clip.arm, clip.psnr) for clip in kept] == [("arm 1", 21.0), ("arm 0", 22.0)]
    assert (kept[1].dense == dense).all() and (kept[1].sparse == sparse).all()

    page, plot, sheet = tmp_path / "docs/page.md", tmp_path / "docs/q.svg", tmp_path / "w.webp"
    main([str(path), "--output", str(page), "--plot", str(plot), "--sheet", str(sheet)])
    text = page.read_text()
    assert "## 8,192 tokens (16x256x256), 30 steps\n\n" in text and "Something to know." in text
    assert "compiled" not in text and "![PSNR against" in text
    assert "(q.svg)" in text and "(../w.webp)" in text
    [line] = [x for x in text.splitlines() if x.startswith("| `mminference@0.2`")]
    assert "34.80 (" in line and "| 1.500 | 1.33x | 0.750 | 2.00x | +1.00 (+1.00 to +1.00)" in line
    assert "0.250 (nearest)" in text and text.count("(nearest)") == 1
    assert "| AdaSpa beats MMInference's estimate at equal density of 0.2 | no |" in text
    assert "| AdaSpa beats MMInference's estimate at equal density of 0.2 | no, -1.0 |" in text
    assert "session: 2.100 to 2.500 s." in text
    assert "* `moa@0.2`: ValueError: no" in text and "* for want of time: `adaspa@0.1`" in text
    assert "Fastest with a mean of 40 dB or more: `compensated_delta`, 1.100 s." in text
    data = json.loads(path.read_text())
    data["settings"]["compiled"] = True
    compiled = tmp_path / "compiled.json"
    compiled.write_text(json.dumps(data))
    assert Result.load(compiled).title == "8,192 tokens (16x256x256), 30 steps, compiled"
    svg = plot.read_text()
    assert all(name in svg for name in ("noise floor", "magcache", "compensated_delta"))
    assert 0 < sheet.stat().st_size <= 300_000
    ssim = tmp_path / "ssim.svg"
    main([str(path), "--output", str(page), "--plot", str(plot), "--plot-ssim", str(ssim)])
    assert plot.read_text() == svg
    assert "SSIM against dense" in ssim.read_text() and "SSIM against dense" not in svg


def test_a_sheet_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="show fewer"):
        write_sheet([WorstClip("a", "b", 1.0, *noise)], tmp_path / "x.webp", most_bytes=100)
    with pytest.raises(ValueError, match="at least one"):
        write_sheet([], tmp_path / "x.webp")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="schema"):
        Result.load(old)
    claims = tmp_path / "claims.txt"
    claims.write_text("a beats b\n")
    with pytest.raises(ValueError, match="BETTER"):
        read_claims(claims)
