"""The order of implementations that was measured on a kind of device.

``tables/<device class>.json`` is written by ``python -m benchmarks.kernels --write-table``. It has
one row for each measured call that several implementations computed, with their names, fastest
first. Nothing is measured while a user waits.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).parent / "tables"
COLUMNS = ("op", "dtype", "dim", "block", "tokens", "density", "order")

# A row speaks for sequences up to so many times shorter or longer.
_REACH = 2.0


class Query(NamedTuple):
    """A call as a table sees it; the fields are the first columns of a row.

    Attributes:
        op: Operation, e.g. ``"attention"``; with summaries ``"attention+summary"``.
        dtype: E.g. ``"bfloat16"``.
        dim: Head dimension.
        block: Tokens in a (query, key) block; None without a mask.
        tokens: Geometric mean of query and key tokens.
        density: Share of blocks kept, or a bound of it; 1 without a mask.
    """

    op: str
    dtype: str
    dim: int
    block: tuple[int, int] | None
    tokens: float
    density: float


def device_class(name: str, capability: tuple[int, int]) -> str:
    """The table that holds for a device, e.g. ``"h100-sm90"`` for "NVIDIA H100 80GB HBM3"."""
    words = name.lower().replace("-", " ").split()
    model = next((word for word in words if any(map(str.isdigit, word))), "unknown")
    return f"{model}-sm{capability[0]}{capability[1]}"


@lru_cache(maxsize=32)
def _rows(device: str) -> tuple[tuple[Query, tuple[str, ...]], ...]:
    path = TABLES / f"{device}.json"
    if not path.exists():
        return ()
    content = json.loads(path.read_text())
    if tuple(content["columns"]) != COLUMNS:
        raise ValueError(f"{path} must have the columns {COLUMNS}; write it again")
    return tuple(
        (Query(op, dtype, dim, None if block is None else tuple(block), *sizes), tuple(order))
        for op, dtype, dim, block, *sizes, order in content["rows"]
    )


@lru_cache(maxsize=1024)
def measured_order(device: str, query: Query) -> tuple[str, ...]:
    """Names of implementations, fastest first; empty where nothing comparable was measured.

    Of the rows with the same op, dtype, head dim and block those count whose sequence is nearest,
    within a factor of 2; of these the row decides whose density is nearest (both as a ratio).
    """
    near = [
        (_ratio(row.tokens, query.tokens), _ratio(row.density, query.density), order)
        for row, order in _rows(device)
        if row[:4] == query[:4]
    ]
    near = [entry for entry in near if entry[0] <= math.log(_REACH) + 1e-9]
    return min(near, key=lambda entry: entry[:2])[2] if near else ()


def _ratio(a: float, b: float) -> float:
    return abs(math.log(max(a, 1e-12) / max(b, 1e-12)))
