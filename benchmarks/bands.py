"""Speed of banded attention against the same patterns as lists of blocks.

``python -m benchmarks.bands --output benchmarks/results/bands-h100.json [--quick] [--tune]``

Every pattern of Sparse-vDiT is computed three ways where they differ: by the banded kernel, by the
list kernel on tokens in the order of the blocks (``lists``), and, for position-major patterns, by
the list kernel with the reordering of queries, keys, values and output included
(``lists+reorder``). The checks run first; if any result is wrong no time is measured and the exit
code is 1. Without a GPU ``--toy`` runs everything at a toy size in triton's interpreter, whose
times mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks.check_bands import CASES, LARGE_CASES, correct
from benchmarks.row_file import write_rows
from dit_sparse.bands import BandMask, video_blocks
from dit_sparse.kernels import ops
from dit_sparse.kernels.triton_attention import Config, choose_path
from dit_sparse.kernels.triton_band import launch
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.plan import Mode


@dataclass(frozen=True)
class Shape:
    """One attention call of a real model, batch 1."""

    model: str
    grid: tuple[int, int, int]
    heads: int
    dim: int
    text: tuple[int, int] = (0, 0)
    densities: tuple[float, ...] = (0.25, 0.125)
    block: int = 128

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.around(self.grid, *self.text)


SHAPES = (
    Shape("Wan2.1-1.3B 480p", (21, 30, 52), 12, 128),
    Shape("CogVideoX-5B", (13, 30, 45), 48, 64, (226, 0)),
    Shape("HunyuanVideo 720p", (33, 45, 80), 24, 128, (0, 256)),
)
TOY = Shape("toy", (2, 5, 8), 3, 64, (0, 3), densities=(0.5,), block=64)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        way: ``"dense"`` (the fastest dense kernel), ``"bands-pointer"``, ``"bands-tma"``,
            ``"lists"`` or ``"lists+reorder"``.
        pattern: Of all heads; ``"mixed"`` deals the three patterns out in turn.
        ms: Median.
        spread: Interquartile range over the median.
        share_of_ideal: Dense time, times density, over this time.
        pattern_bytes: What the kernel reads to know its blocks.
    """

    way: str
    pattern: str
    model: str
    tokens: int
    heads: int
    dim: int
    block: int
    density: float
    ms: float
    spread: float
    repeats: int
    share_of_ideal: float
    pattern_bytes: int


def patterns(shape: Shape, density: float) -> dict[str, BandMask]:
    """The patterns to compare, at one density."""
    blocks = video_blocks(shape.layout, shape.block)
    kinds = {
        name: Mode(name, density).pattern(blocks)
        for name in ("diagonal", "multi_diagonal", "vertical_stripe")
    }
    heads = {name: (kind,) * shape.heads for name, kind in kinds.items()}
    heads["mixed"] = tuple(list(kinds.values())[i % 3] for i in range(shape.heads))
    return {name: BandMask(each, shape.block, shape.layout) for name, each in heads.items()}


def by_lists(bands: BandMask, device: str) -> tuple[Callable[..., Tensor], bool, int]:
    """The same attention through lists of blocks.

    Returns:
        A function of q, k and v; whether it reorders tokens; bytes of its lists.
    """
    groups = []
    for name, heads in bands.groups().items():
        order = bands.ordering(name, torch.device(device))
        whole = len(heads) == len(bands.heads)
        index = None if whole else torch.tensor(heads, device=device)
        groups.append((index, order, bands.block_mask(heads, device)))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for index, order, mask in groups:
            x = [q, k, v] if index is None else [t.index_select(2, index) for t in (q, k, v)]
            x = x if order is None else [order.apply(t) for t in x]
            found = ops.attention(*x, mask, impl="triton").out
            found = found if order is None else order.undo(found)
            if index is None:
                return found
            out.index_copy_(2, index, found)
        return out

    reorders = any(order is not None or index is not None for index, order, _ in groups)
    return call, reorders, sum(mask.nbytes() for *_, mask in groups)


def in_block_order(bands: BandMask, device: str) -> Callable[..., Tensor] | None:
    """Lists alone, on tokens that are in the order of the blocks already; None if orders mix."""
    if len(bands.groups()) != 1:
        return None
    mask = bands.block_mask(tuple(range(len(bands.heads))), device)
    return lambda q, k, v: ops.attention(q, k, v, mask, impl="triton").out


def measure(
    function: Callable[..., object], sets: list[tuple[Tensor, ...]], device: str, budget_s: float
) -> tuple[float, float, int]:
    """Median milliseconds, relative interquartile range and number of repeats."""
    if device != "cpu":
        from benchmarks.kernels import measure as on_cuda

        return on_cuda(function, sets, budget_s)
    times = []
    for _ in range(2):
        began = time.perf_counter()
        function(*sets[0])
        times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle, len(times)


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Sets of q, k, v, more than one if one may stay in the cache."""
    rng = torch.Generator(device).manual_seed(0)
    size = (3, 1, shape.layout.tokens, shape.heads, shape.dim)
    sets = 1 if shape.layout.tokens * shape.heads * shape.dim >= 1 << 26 else 3
    return [
        tuple(torch.randn(size, generator=rng, device=device, dtype=dtype).unbind(0))
        for _ in range(sets)
    ]


def dense_ways() -> dict[str, Callable[..., object]]:
    """Dense kernels other than ours; torch's own choice where there is no GPU."""
    if torch.cuda.is_available():
        from benchmarks.kernels import dense_backends

        return dense_backends()
    return {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
    }


def compare(shape: Shape, device: str, dtype: torch.dtype, budget_s: float) -> list[Row]:
    """All ways of all patterns of ``shape``, printed as they are measured."""
    sets = inputs(shape, device, dtype)
    q, k, v = sets[0]
    path = choose_path(ops.AttentionCall(q, k, v, None, None, 1.0))
    rows: list[Row] = []
    best = [float("inf")]

    def add(
        way: str, name: str, density: float, size: int, function: Callable[..., object]
    ) -> None:
        ms, spread, repeats = measure(function, sets, device, budget_s)
        best[0] = min(best[0], ms) if way == "dense" else best[0]
        share = best[0] * density / ms
        row = Row(
            way, name, shape.model, shape.layout.tokens, shape.heads, shape.dim, shape.block,
            round(density, 4), ms, spread, repeats, share, size,
        )  # fmt: skip
        rows.append(row)
        print(
            f"{shape.model:18s} {name:16s} {way:14s} {density:7.4f} {ms:9.3f} ms "
            f"±{100 * spread:4.1f} % {100 * share:6.1f} % of ideal {size:10d} B",
            flush=True,
        )

    for name, dense in dense_ways().items():
        add("dense", name, 1.0, 0, dense)
    for wanted in shape.densities:
        for name, bands in patterns(shape, wanted).items():
            density = float(bands.head_density().mean())
            listed, reorders, size = by_lists(bands, device)
            for how in ("pointer", "tma") if path == "tma" else ("pointer",):
                add(
                    f"bands-{how}", name, density, 16 * shape.heads,
                    lambda q, k, v, b=bands, how=how: launch(
                        ops.BandedCall(q, k, v, b, None, q.shape[-1] ** -0.5), how
                    ),
                )  # fmt: skip
            ready = in_block_order(bands, device)
            if ready is not None:
                add("lists", name, density, size, ready)
            if reorders:
                add("lists+reorder", name, density, size, listed)
    return rows


def tune(shape: Shape, device: str, dtype: torch.dtype, budget_s: float) -> None:
    """Prints times of launch parameters around the defaults, for a mix of patterns."""
    sets = inputs(shape, device, dtype)
    q, k, v = sets[0]
    path = choose_path(ops.AttentionCall(q, k, v, None, None, 1.0))
    bands = patterns(shape, shape.densities[0])["mixed"]
    for how in ("pointer", "tma") if path == "tma" else ("pointer",):
        for tile_q, tile_k, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
            config = Config(tile_q, tile_k, warps, stages)
            try:
                ms, spread, _ = measure(
                    lambda q, k, v, how=how, config=config: launch(
                        ops.BandedCall(q, k, v, bands, None, q.shape[-1] ** -0.5), how, config
                    ),
                    sets,
                    device,
                    budget_s,
                )
            except triton.runtime.errors.OutOfResources as error:
                print(f"{shape.model} {how} {tuple(config)}: {error}", flush=True)
                continue
            print(
                f"{shape.model} {how} {tuple(config)}: {ms:.3f} ms ±{100 * spread:.1f} %",
                flush=True,
            )


def machine() -> dict[str, str]:
    """GPU, driver and versions; the processor where there is no GPU."""
    if torch.cuda.is_available():
        from benchmarks.kernels import machine as gpu

        return gpu()
    return {
        "name": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--toy", action="store_true", help="a toy size, without a GPU")
    parser.add_argument("--tune", action="store_true", help="also print launch parameters")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds per measurement")
    options = parser.parse_args(arguments)
    if not (options.toy or torch.cuda.is_available()):
        sys.exit("needs a CUDA device; --toy runs in triton's interpreter (TRITON_INTERPRET=1)")
    device = "cpu" if options.toy else "cuda"
    # The interpreter has no bfloat16 matrix product.
    dtype = torch.float16 if options.toy else torch.bfloat16
    shapes = (TOY,) if options.toy else SHAPES[: 1 if options.quick else None]
    if not correct(CASES[-3:] if options.toy else CASES + LARGE_CASES, device, dtype):
        print("results are wrong; no speed is measured")
        return 1
    rows: list[Row] = []
    for shape in shapes:
        rows += compare(shape, device, dtype, options.budget)
        if options.output:  # after every shape, so that an interrupted run leaves its part
            facts = {"machine": machine(), "dtype": str(dtype)}
            write_rows(options.output, facts, map(asdict, rows))
        if options.tune:
            tune(shape, device, dtype, options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
