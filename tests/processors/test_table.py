"""docs/families.md and docs/composition.md say what is so."""

from __future__ import annotations

from pathlib import Path

import composition
import diffusers
import pytest
from test_family_compile import REGIONAL, TINY, WHOLE
from test_features import ABSENT, PRESENT
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

from dit_sparse import list_families
from dit_sparse.cli import app
from dit_sparse.processors import table
from dit_sparse.processors.refused import REFUSED
from dit_sparse.processors.table import (
    COMPILED,
    IN_PIPELINES,
    family_rows,
    to_markdown,
    transformer_classes,
)

DOCS = Path(__file__).parents[2] / "docs"
COMMITTED = DOCS / "families.md"


def test_the_committed_table_is_current() -> None:
    text = COMMITTED.read_text()
    if f"diffusers {diffusers.__version__}." not in text:
        pytest.skip("written with another diffusers")
    assert text == to_markdown(), "run: dit-sparse families --markdown > docs/families.md"


def test_the_committed_features_are_current() -> None:
    text = (DOCS / "composition.md").read_text()
    if f"diffusers {diffusers.__version__}." not in text:
        pytest.skip("written with another diffusers")
    command = "python tests/processors/composition.py > docs/composition.md"
    assert text == composition.to_markdown(), f"run: {command}"
    # Every mark is a test of its own.
    assert text.count("| ✓") == len(PRESENT) and text.count("| –") == len(ABSENT)


def test_what_is_claimed_is_tested() -> None:
    assert set(COMPILED) == {TINY[name].model for name in (*REGIONAL, *WHOLE)}
    used = {(tiny.model, tiny.pipeline) for tiny in PIPELINES}
    assert {(model, name) for model, names in IN_PIPELINES.items() for name in names} == used


def test_every_class_is_in_one_table() -> None:
    rows = {row.model: row for row in family_rows()}
    assert set(rows) == set(list_families())
    text = to_markdown()
    for model in (*rows, *REFUSED):
        assert text.count(f"| {model} |") == 1
    root = COMMITTED.parents[1]
    assert all(
        (root / "dit_sparse/processors" / f"{row.adapter}.py").exists() for row in rows.values()
    )
    classes = transformer_classes()
    assert {
        model: hasattr(classes[model], "set_attn_processor") if model in classes else None
        for model in rows
    } == {model: row.has_method for model, row in rows.items()}


def test_the_command_prints_both_tables() -> None:
    plain = CliRunner().invoke(app, ["families"])
    assert plain.exit_code == 0
    assert "MochiTransformer3DModel" in plain.output
    assert "linear already" in plain.output
    markdown = CliRunner().invoke(app, ["families", "--markdown"])
    assert markdown.output == to_markdown()


def test_the_command_marks_what_this_diffusers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = dict(transformer_classes())
    del classes["MochiTransformer3DModel"]
    monkeypatch.setattr(table, "transformer_classes", lambda: classes)
    out = CliRunner().invoke(app, ["families"], env={"COLUMNS": "160"}).output
    lines = out.splitlines()
    (absent,) = (line for line in lines if " MochiTransformer3DModel " in line)
    (present,) = (line for line in lines if " WanTransformer3DModel " in line)
    assert "not in this diffusers" in absent
    assert "not in this diffusers" not in present
