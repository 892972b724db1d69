"""`dit-sparse gna-plan`: proposals, given windows, the simulator, and its errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from dit_sparse.cli import app

runner = CliRunner()


def plan(*arguments: str) -> Any:
    result = runner.invoke(app, ["gna-plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_proposals_are_near_the_density_and_differ() -> None:
    found = plan("13x30x45", "--density", "0.3", "--count", "4", "--block", "64")
    assert found["grid"] == [13, 30, 45] and len(found["plans"]) == 4
    for row in found["plans"]:
        assert 0.24 < row["density"] < 0.375
        assert row["computed"] >= row["density"]
        assert row["speedup"] == pytest.approx(1 / row["computed"])
        assert row["block_sparse"] == (row["partial"] == 0)
    assert len({tuple(row["window"]) for row in found["plans"]}) == 4


def test_text_counts() -> None:
    options = ("4x8x8", "--window=-1x3x3", "--block", "64")
    alone, joined = plan(*options)["plans"][0], plan(*options, "--text", "64")["plans"][0]
    video, text = 256, 64
    kept = alone["density"] * video**2 + 2 * video * text + text**2
    assert joined["density"] == pytest.approx(kept / (video + text) ** 2)


def test_given_windows_with_their_tile() -> None:
    (row,) = plan("30x48x80", "--window", "18x24x24", "--stride", "16x8x8")["plans"]
    assert row["block_sparse"] and row["density"] == pytest.approx(0.09)
    assert row["speedup"] == pytest.approx(1 / 0.09)
    options = ("--tile", "2x4x8", "--causal", "t", "--dilation", "1x2x1")
    (row,) = plan("4x8x8", "--window", "3", *options)["plans"]
    assert row["tile"] == [2, 4, 8] and not row["block_sparse"] and row["partial"] > 0
    assert row["causal"] == [True, False, False] and row["dilation"] == [1, 2, 1]


def test_simulator() -> None:
    options = ("30x48x80", "--window", "18x24x24", "--q-tile", "4x8x8", "--kv-tile", "2x8x8")
    (row,) = plan(*options, "--attention-share", "0.607")["plans"]
    assert round(row["end_to_end"], 2) == 1.73 and not row["block_sparse"]
    (row,) = plan(*options, "--stride", "16x8x8", "--attention-share", "0.607", "--warmup", "0.3")[
        "plans"
    ]
    assert round(row["end_to_end"], 2) == 1.63 and row["block_sparse"]
    assert row["speedup"] == pytest.approx(100 / 9)
    # 30 frames in query tiles of 4 are padded to 32.
    assert row["unpadded_speedup"] == pytest.approx(row["mean_speedup"] * 30 / 32)


def test_images_and_one_number_for_all_axes() -> None:
    (row,) = plan("32x24", "--window", "9")["plans"]
    assert row["window"] == [1, 9, 9]
    (row,) = plan("32x24", "--window", "8x9", "--stride", "8x1")["plans"]
    assert row["window"] == [1, 8, 9] and row["stride"] == [1, 8, 1]


def test_tables() -> None:
    result = runner.invoke(app, ["gna-plan", "16x32x32", "--count", "2"])
    assert result.exit_code == 0
    for text in ("16x32x32", "16,384", "full", "speed-up", "16x18x18"):
        assert text in result.stdout
    result = runner.invoke(app, ["gna-plan", "9x9", "--window", "3", "--dilation", "2"])
    assert "dilation" in result.stdout and "1x2x2" in result.stdout and "partial" in result.stdout
    result = runner.invoke(
        app, ["gna-plan", "8x8", "--window", "3", "--q-tile", "4x4", "--kv-tile", "4x4"]
    )
    assert "unpadded" in result.stdout and "kv tile" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["64"], "GRID must be"),
        (["64xW"], "GRID must be"),
        (["0x4"], "at least one token"),
        (["8x8", "--density", "1.5"], "density must be in"),
        (["8x8", "--window", "9"], "window along height"),
        (["8x8", "--window", "a"], "--window must be"),
        (["8x8", "--stride", "2"], "go with --window"),
        (["8x8", "--window", "3", "--q-tile", "2x2"], "go together"),
        (["8x8", "--window", "3", "--q-tile", "0x2", "--kv-tile", "2x2"], "at least 1"),
        (["8x8", "--window", "3", "--tile", "0x2"], "--tile must be"),
        (["8x8", "--window", "3", "--causal", "x"], "letters out of thw"),
        (["8x8", "--block", "32"], "64 or 128"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["gna-plan", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.output
    assert result.stdout == ""


def test_help_explains_the_columns() -> None:
    result = runner.invoke(app, ["gna-plan", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for text in ("GRID", "block-sparse", "end to end", "HunyuanVideo"):
        assert text in result.stdout
