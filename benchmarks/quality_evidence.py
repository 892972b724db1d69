"""The file of an evidence run: written after every arm, and continued by a later run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality_run import Setting
from dit_sparse.eval.compare import machine_info

SCHEMA = 2


@dataclass
class Evidence:
    """The result file.

    Attributes:
        path: Where it is, or None to keep it in memory.
        data: Its content.
    """

    path: Path | None
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, setting: Setting, device: str, check: bool = True) -> Evidence:
        """A new result, or the one in ``path`` to be continued.

        Args:
            path: The file.
            setting: What this run generates.
            device: Where.
            check: Whether to refuse what another setting or graphics card has made.

        Raises:
            ValueError: If that one is of another setting or graphics card.
        """
        fresh = {
            "schema": SCHEMA,
            "machine": machine_info(device),
            "settings": setting.to_dict(),
            "sessions": [],
            "rows": [],
            "skipped": [],
        }
        if path is None or not path.is_file():
            return cls(path, fresh)
        data = json.loads(path.read_text(encoding="utf-8"))
        if not check:
            return cls(path, data)
        for name in ("schema", "settings"):
            if data.get(name) != fresh[name]:
                raise ValueError(f"{path} has other {name} than this run; give another --output")
        there, here = data["machine"]["gpu"], machine_info(device)["gpu"]
        if there != here:
            raise ValueError(f"{path} was measured on {there}, this is {here}")
        return cls(path, data)

    def row(self, label: str) -> dict[str, Any] | None:
        """The row of an arm that ran to its end."""
        for row in self.data["rows"]:
            if row["arm"] == label and "error" not in row:
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Adds or replaces a row, and writes the file."""
        label = row["arm"]
        self.data["rows"] = [r for r in self.data["rows"] if r["arm"] != label] + [row]
        self.write()

    def skip(self, arm: str, reason: str) -> None:
        """Notes why an arm did not run, and writes the file."""
        print(f"{arm}: skipped, {reason}", flush=True)
        self.data["skipped"].append({"arm": arm, "reason": reason})
        self.write()

    def write(self) -> None:
        """Writes the file, so that an interrupt leaves the previous or this version."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)
