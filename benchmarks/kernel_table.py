"""The table by which ``impl="auto"`` chooses on a machine, from rows that were measured on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_sparse.kernels.measured import COLUMNS, TABLES, device_class
from dit_sparse.kernels.triton_attention import prefers_tma
from dit_sparse.mask import block_sides

# Implementations by the backends of rows. Where a shape was timed with several kernels of Triton's,
# that one counts which the implementation takes.
NAMES = {
    "triton": "triton",
    "triton-pointer": "triton",
    "triton-tma": "triton",
    "triton-hopper": "triton",
    "sdpa-cudnn": "cudnn",
    "flash-attn-3": "flash-attn-3",
    "flash-attn-4": "flash-attn-4",
}
# Operations of the table by those of rows.
OPS = {"attention": "attention", "zeroth, kernel": "attention+summary"}


def make_table(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of one kind of machine.

    Args:
        results: Contents of files that ``benchmarks.kernels`` wrote, all on such machines. A call
            that several of them timed counts as in the last.

    Raises:
        ValueError: If they come from different kinds of machines, or do not say from which.
    """
    classes = set()
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for content in results:
        machine = content["machine"]
        if "capability" not in machine:
            raise ValueError("expected machine.capability in the results; measure them again")
        major, minor = machine["capability"].split(".")
        classes.add(device_class(machine["name"], (int(major), int(minor))))
        timed: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in content["rows"]:
            if row["op"] not in OPS or row["backend"] not in NAMES or row["config"] is not None:
                continue
            _, tokens, dim = (int(size) for size in row["shape"].split("x"))
            block = None if row["block"] is None else tuple(block_sides(row["block"]))
            key = (OPS[row["op"]], "bfloat16", dim, block, tokens, row["density"])
            timed.setdefault(key, {})[row["backend"]] = row["ms"]
        for key, times in timed.items():
            if {"triton-tma", "triton-hopper"} & set(times):
                times.pop("triton-pointer", None)
            if "triton-hopper" in times and "triton-tma" in times:
                dim, block = key[2:4]
                times.pop("triton-hopper" if prefers_tma(dim, block) else "triton-tma")
            named = {NAMES[backend]: ms for backend, ms in times.items()}
            cells[key] = {**cells.get(key, {}), **named}
    if len(classes) != 1:
        raise ValueError(f"expected results of one kind of machine, got {sorted(classes)}")
    rows = [
        [*key, sorted(times, key=times.__getitem__)]
        for key, times in sorted(cells.items(), key=lambda cell: str(cell[0]))
        if len(times) > 1
    ]
    return {
        "device": classes.pop(),
        "machine": results[-1]["machine"],
        "columns": list(COLUMNS),
        "rows": rows,
    }


def write_table(files: list[Path], folder: Path = TABLES) -> Path:
    """Writes the table of the machine of ``files`` into ``folder``, one line for each row."""
    table = make_table([json.loads(file.read_text()) for file in files])
    rows = table.pop("rows")
    head = json.dumps(table, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path = folder / f"{table['device']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    return path
