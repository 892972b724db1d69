"""Tables keep what they were given and refuse what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call, ModelIdentity
from dit_sparse.methods.pattern_table import HeadPatterns, Pattern, PatternTable, pair_count
from dit_sparse.schedule import Step

GRID = Pattern("grid", "2hw", "hvs", 0.25)


def table(**changes: Any) -> PatternTable:
    values: dict[str, Any] = {
        "model": ModelIdentity("AModel", (("flag", "true"), ("layers", "2"))),
        "layers": 2,
        "heads": 2,
        "dim": 8,
        "modalities": 2,
        "settings": {"sparsity": 0.8, "tile": [4, 4, 4]},
        "patterns": (GRID, Pattern("a-shape", density=0.2)),
        "choices": (
            (HeadPatterns("none", (0,), 0.1), HeadPatterns("q", (1, 0), 0.2)),
            (HeadPatterns("2d", (0, 1, 1, 0), 0.0), HeadPatterns("none", (1,), 0.5)),
        ),
        "provenance": {"prompt": "a star"},
    }
    return PatternTable(**values | changes)


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table().save(path)
    assert PatternTable.load(path) == table()
    assert json.loads(path.read_text())["format"] == "dit-sparse/mminference"
    # A file that changes is read again.
    table(dim=16).save(path)
    path.touch()
    assert PatternTable.load(path).dim == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1"),
        ({"format": "other"}, "dit-sparse/mminference"),
        ({"heads": 3}, "2 layers of 3 heads"),
        ({"modalities": 3}, "expected 3 patterns"),
        ({"extra": 1}, "extra"),
        ({"patterns": []}, "indices of 0 patterns"),
        ({"patterns": [{"kind": "grid", "stride": "hw", "lines": "sv"}]}, "lines of a grid"),
        ({"patterns": [{"kind": "grid", "stride": "q", "lines": "s"}]}, "a stride is one of"),
        ({"patterns": [{"kind": "blob"}]}, "kind must be"),
        ({"patterns": [{"kind": "a-shape", "stride": "hw"}]}, "only a grid"),
        ({"patterns": [{"kind": "a-shape", "density": 0}]}, "density must be"),
        ({"patterns": [{"kind": "a-shape", "size": 1}]}, "size"),
        ({"choices": [[{"boundary": "q"}]]}, "whole pattern table"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table().to_dict() | change))
    with pytest.raises(ValueError, match=message):
        PatternTable.load(path)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json"):
        PatternTable.load(tmp_path / "absent.json")
    for text, message in (("{", "not JSON"), ("[]", "format"), ("{}", "format")):
        path = tmp_path / f"{len(text)}{message.replace(' ', '')}.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            PatternTable.load(path)
    assert [pair_count(boundary, 3) for boundary in ("none", "q", "2d")] == [1, 3, 9]


def test_missing_parts_are_refused() -> None:
    data = table().to_dict()
    for key in ("layers", "choices", "settings", "model"):
        with pytest.raises(ValueError, match="whole pattern table"):
            PatternTable.from_dict({k: v for k, v in data.items() if k != key})


def call(model: ModelIdentity | None = None, layers: int = 2, heads: int = 2, dim: int = 8) -> Call:
    x = torch.zeros(1, 6, heads, dim)
    return Call(
        x, x, x, TokenLayout((1, 2, 3)), Step(0, 1, 0.0, "cond", 0), 0, layers, None, {}, None,
        "auto", lambda with_lse: (x, None), model=model,
    )  # fmt: skip


def test_other_models_are_refused() -> None:
    table().check(call(), 2)
    table().check(call(table().model), 2)
    # Keys that only one side knows come from another release.
    table().check(call(ModelIdentity("AModel", (("flag", "true"), ("new", "1")), "expert")), 2)
    for other, modalities, message in (
        (call(layers=3), 2, "it has 2 layers, the model 3"),
        (call(heads=3), 2, "it has 2 heads, the model 3"),
        (call(dim=9), 2, "it has 8 channels a head, the model 9"),
        (call(), 1, "it has 2 modalities, the model 1"),
        (call(ModelIdentity("Other")), 2, "it is for a AModel, not a Other"),
        (call(ModelIdentity("AModel", (("flag", "false"),))), 2, "flag = true, this one false"),
    ):
        with pytest.raises(ValueError, match=message):
            table().check(other, modalities)
