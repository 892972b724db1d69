"""Speed of neighborhood attention on the grids of real models.

``python -m benchmarks.neighborhood --output benchmarks/results/neighborhood-h100.json [--quick]``

Every kind of case is checked against the reference at a small size first
(`benchmarks.check_neighborhood`); if anything is wrong no time is measured and the exit code is 1.

``order_ms`` is the time to bring q, k and v into the order of the mask and the output back.
``share_of_ideal`` is the best dense time, times the density, over ``ms + order_ms``. ``computed``
is the share of block pairs that the kernels compute, so ``density / computed`` is the share of
ideal that perfect kernels could reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import check_neighborhood
from benchmarks.kernels import Shape, dense_backends, inputs, machine, measure
from benchmarks.row_file import write_rows
from dit_sparse.kernels import ops
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.gna import GNA
from dit_sparse.neighborhood_mask import arrange


@dataclass(frozen=True)
class Problem:
    """One attention call of a model, and the settings to time on it."""

    model: str
    layout: TokenLayout
    heads: int
    dim: int
    methods: tuple[GNA, ...]


def _methods(*windows: float | tuple) -> tuple[GNA, ...]:
    """Planned windows (a density) and given ones (window, stride), in blocks of 64 and 128."""
    return tuple(
        GNA(window=w, block=block)
        if isinstance(w, float)
        else GNA(window=w[0], stride=w[1], block=block)
        for w in windows
        for block in (128, 64)
    )


PROBLEMS = (
    Problem(
        "HunyuanVideo at the grid of the paper", TokenLayout((30, 48, 80)), 24, 128,
        _methods(((18, 24, 24), (16, 8, 8)), ((18, 24, 24), 1), ((30, 40, 40), (1, 32, 8))),
    ),
    Problem(
        "HunyuanVideo 720p", TokenLayout((33, 45, 80), 256), 24, 128,
        _methods(0.1, 0.3, ((33, 27, 48), (1, 9, 16)), ((33, 27, 48), 1)),
    ),
    Problem("Wan2.1-1.3B 480p", TokenLayout((21, 30, 52)), 12, 128, _methods(0.1, 0.3)),
    Problem("CogVideoX-5B", TokenLayout((13, 30, 45), 226), 48, 64, _methods(0.3)),
    Problem(
        "FLUX at 4096 px", TokenLayout((1, 256, 256), 512), 24, 128,
        _methods(((1, 80, 80), (1, 16, 16)), ((1, 80, 80), 1)),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement; ``spread`` is the interquartile range over the median."""

    model: str
    tokens: int
    backend: str
    window: Sequence[int] | None = None
    stride: Sequence[int] | None = None
    tile: Sequence[int] | None = None
    block: int | None = None
    density: float = 1.0
    computed: float = 1.0
    partial: float = 0.0
    ms: float = 0.0
    spread: float = 0.0
    order_ms: float = 0.0
    share_of_ideal: float | None = None


def time_problem(problem: Problem, budget_s: float) -> list[Row]:
    """The dense kernels, then every setting, on random inputs."""
    layout, device = problem.layout, torch.device("cuda")
    shape = Shape(problem.heads, layout.tokens, problem.dim)
    sets = inputs(shape, torch.Generator("cuda").manual_seed(0))
    rows = []
    for name, function in dense_backends().items():
        ms, spread, _ = measure(function, sets, budget_s)
        rows.append(Row(problem.model, layout.tokens, name, ms=ms, spread=spread))
    best = min(row.ms for row in rows)
    for method in problem.methods:
        plan = method.plan(layout)
        found = arrange(layout, plan.neighborhood, plan.tile, plan.block, device)
        mask, order = found.mask, found.order
        ms, spread, _ = measure(
            lambda q, k, v, m=mask: ops.neighborhood_attention(q, k, v, m), sets, budget_s
        )
        order_ms = 0.0
        if order is not None:
            order_ms, _, _ = measure(
                lambda q, k, v, o=order: [o.undo(q), *(o.apply(x) for x in (q, k, v))],
                sets, budget_s,
            )  # fmt: skip
        density, computed = float(mask.head_density), mask.visited.density()
        rows.append(
            Row(
                problem.model, layout.tokens, "ours", plan.neighborhood.window,
                plan.neighborhood.stride, plan.tile, plan.block, density, computed,
                0.0 if mask.partial is None else mask.partial.density() / computed,
                ms, spread, order_ms, best * density / (ms + order_ms),
            )
        )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="only Wan2.1-1.3B and CogVideoX")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds per measurement")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    if not check_neighborhood.run():
        print("results are wrong; no speed is measured")
        return 1
    rows: list[Row] = []
    for problem in PROBLEMS[2:4] if arguments.quick else PROBLEMS:
        for row in time_problem(problem, arguments.budget):
            rows.append(row)
            share = "" if row.share_of_ideal is None else f"{100 * row.share_of_ideal:5.1f} %"
            print(
                f"{row.model:38s} {row.backend:18s} {row.window!s:14s} {row.stride!s:12s} "
                f"{row.tile!s:14s} {row.block or '-':>4} density {row.density:.3f} computed "
                f"{row.computed:.3f} partial {row.partial:.2f} {row.ms:8.3f} ms + "
                f"{row.order_ms:.3f} {share}",
                flush=True,
            )
        torch.cuda.empty_cache()
        if arguments.output:  # after every problem, so that an interrupted run leaves its part
            write_rows(arguments.output, {"machine": machine()}, map(asdict, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
