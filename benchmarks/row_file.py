"""JSON files of benchmarks: what was measured on, and one row a line, so that they can be read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: Path, facts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes ``{**facts, "rows": [...]}``; folders that do not exist are made.

    Args:
        path: The file.
        facts: Machine, versions, settings; plain data.
        rows: Plain data.
    """
    head = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items()]
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join([*head, f'"rows": [\n{body}\n ]']) + "\n}\n")
