"""What compensated delta is compared with, as settings of it.

Each has the idea of its namesake in the frame of this method: equal blocks in tiles, a fixed share
of them, the same dense start. They are not reproductions; see docs/methods/compensated_delta.md.
"""

from __future__ import annotations

from typing import Any

from dit_sparse.methods.compensated_delta import CompensatedDelta

_SEARCH_EVERY_STEP = {"delta": False, "refresh": "rows", "period": 1, "mask_period": 1}
_NO_COMPUTE = {"density": 0.0, "summary": "drop", "refresh": "all", "period": 4}

# drop: exact-mass search at the last dense step, the rest is skipped (AdaSpa, arXiv 2502.21079).
# sol_attn: pooled search in every step, block means (Sol-Attn, arXiv 2607.24027).
# pisa: the same with the first-order term (PISA, arXiv 2602.01077).
# svg_ear: search by what the means get wrong (SVG-EAR, arXiv 2603.08982).
# reuse: attention outputs of the last dense step, as they are or continued linearly from two.
BASELINES: dict[str, dict[str, Any]] = {
    "drop": {"delta": False, "summary": "drop", "refresh": "never", "density": 0.2},
    "sol_attn": {**_SEARCH_EVERY_STEP, "summary": "centroid", "selection": "pooled"},
    "pisa": {**_SEARCH_EVERY_STEP, "summary": "first_order", "selection": "pooled"},
    "svg_ear": {**_SEARCH_EVERY_STEP, "summary": "centroid", "selection": "error"},
    "reuse": _NO_COMPUTE,
    "reuse_extrapolated": {**_NO_COMPUTE, "extrapolate": True, "adapt": False},
}


def baseline(name: str, **options: Any) -> CompensatedDelta:
    """The baseline called ``name``.

    Args:
        name: A key of :data:`BASELINES`.
        **options: Settings that differ, e.g. ``density=0.2``.

    Raises:
        ValueError: If there is none of this name, or as :class:`CompensatedDelta`.
    """
    if name not in BASELINES:
        raise ValueError(f"a baseline is one of {sorted(BASELINES)}, got {name!r}")
    return CompensatedDelta(**{**BASELINES[name], **options})


def as_arm(name: str) -> str:
    """The baseline as ``--methods`` takes it, e.g. ``compensated_delta:delta=False:...``."""
    settings = [f"{key}={value}" for key, value in BASELINES[name].items()]
    return ":".join([CompensatedDelta.name, *settings])
