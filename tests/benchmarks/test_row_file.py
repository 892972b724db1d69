"""Files of rows are JSON, with a line for each row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.row_file import write_rows


@pytest.mark.parametrize("rows", [[], [{"ms": 1.5, "block": [128, 64]}, {"ms": None}]])
def test_what_is_written_is_read(rows: list[dict], tmp_path: Path) -> None:
    path = tmp_path / "made" / "rows.json"
    write_rows(path, {"machine": {"name": 'a "GPU"'}, "only": None}, rows)
    text = path.read_text()
    assert json.loads(text) == {"machine": {"name": 'a "GPU"'}, "only": None, "rows": rows}
    assert sum("ms" in line for line in text.splitlines()) == len(rows)
