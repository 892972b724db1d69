"""Speed of the sparse kernels against the dense kernels of the same machine.

``python -m benchmarks.kernels --output benchmarks/results/kernels-h100.json [--quick]``
``python -m benchmarks.kernels --write-table RESULTS.json`` makes of such results the table by
which ``impl="auto"`` chooses on such a machine.

The kernels are checked first; if any result is wrong no time is measured and the exit code is 1.
``share_of_ideal`` is the best dense time, times the density, over the measured time: 1.0 at density
0.1 means ten times as fast as the best dense kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import check_kernels
from benchmarks.kernel_table import write_table
from benchmarks.row_file import write_rows
from dit_sparse.kernels import ops
from dit_sparse.kernels.triton_attention import Config, hopper_reasons, launch, tma_reasons
from dit_sparse.kernels.triton_mask import expand
from dit_sparse.kernels.triton_quantize import quantize
from dit_sparse.mask import Block, BlockMask, PackedMask, block_count, block_sides

# 256 MiB of inputs do not fit the 50 MiB of L2 of an H100: rotating further sets changes nothing.
ROTATED_BYTES = 256 << 20
PARTS = ("attention", "passes", "summaries", "fp8", "tune")


@dataclass(frozen=True)
class Shape:
    """One attention call of a real model, batch 1."""

    heads: int
    tokens: int
    dim: int
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
    blocks: tuple[Block, ...] = (128, (128, 64), 64)

    def __str__(self) -> str:
        return f"{self.heads}x{self.tokens}x{self.dim}"


SHAPES = (
    Shape(12, 32_768, 128),  # Wan2.1-1.3B at 480p, rounded to whole blocks
    Shape(48, 17_792, 64),  # CogVideoX-5B
    Shape(6, 8_192, 64),
    Shape(6, 16_384, 64),
    Shape(40, 75_600, 128, (0.5, 0.25, 0.1, 0.05), (128, (128, 64))),  # Wan2.1-14B at 720p
    Shape(24, 118_784, 128, (0.5, 0.25, 0.1, 0.05), (128, (128, 64))),  # HunyuanVideo at 720p
)
QUICK_SHAPES = (Shape(12, 32_768, 128, densities=(1.0, 0.25, 0.1), blocks=(128,)),)


@dataclass(frozen=True)
class Row:
    """One measurement; ``spread`` is the interquartile range over the median."""

    backend: str
    op: str
    shape: str
    block: Block | None
    density: float
    ms: float
    spread: float
    repeats: int
    tflops: float
    share_of_ideal: float | None
    config: str | None = None


def inputs(shape: Shape, rng: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of q, k, v ``[1, tokens, heads, dim]`` bf16, more than one if one may stay in L2."""
    size = (3, 1, shape.tokens, shape.heads, shape.dim)
    one = 2 * 3 * shape.tokens * shape.heads * shape.dim
    sets = 1 if one >= ROTATED_BYTES else 3
    return [
        tuple(torch.randn(size, generator=rng, device="cuda", dtype=torch.bfloat16).unbind(0))
        for _ in range(sets)
    ]


def random_mask(shape: Shape, block: Block, density: float, rng: torch.Generator) -> BlockMask:
    """A random mask for every head whose rows all keep the same number of blocks."""
    rows, columns = (block_count(shape.tokens, side) for side in block_sides(block))
    kept = max(1, round(density * columns))
    scores = torch.rand(1, shape.heads, rows, columns, generator=rng, device="cuda")
    chosen = scores.topk(kept, dim=-1).indices
    keep = torch.zeros(scores.shape, dtype=torch.bool, device="cuda").scatter_(-1, chosen, True)
    return BlockMask.from_dense(keep, block, shape.tokens)


def measure(
    function: Callable[..., object], sets: list[tuple[Tensor, ...]], budget_s: float
) -> tuple[float, float, int]:
    """Median milliseconds, relative interquartile range and number of repeats."""
    for arguments in sets:  # compiles, fills caches
        function(*arguments)
    torch.cuda.synchronize()
    began = time.perf_counter()
    function(*sets[0])
    torch.cuda.synchronize()
    once = time.perf_counter() - began
    repeats = max(5, min(100, int(budget_s / max(once, 1e-5))))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for index, (start, end) in enumerate(events):
        start.record()
        function(*sets[index % len(sets)])
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle, repeats


def dense_backends() -> dict[str, Callable[[Tensor, Tensor, Tensor], object]]:
    """Dense attention over ``[batch, tokens, heads, dim]`` by kernels other than ours."""

    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], object]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
                ).transpose(1, 2)

        return call

    found = {
        "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    installed = {impl.name for impl in ops.implementations("attention")}
    flash = [name for name in ("flash-attn-3", "flash-attn-4") if name in installed]
    return {
        **{
            name: lambda q, k, v, name=name: ops.attention(q, k, v, impl=name).out for name in flash
        },
        **found,
    }


class OutOfTime(Exception):
    """The time for all measurements is spent."""


def correct(tma: bool) -> bool:
    """Whether every backend and kind of shape that is timed below gives right results."""
    good = check_kernels.in_processes(
        len(check_kernels.BENCHMARK_CASES), ["--benchmark", *([] if tma else ["--no-tma"])]
    )
    q, k, v = inputs(Shape(2, 1024, 64), torch.Generator("cuda").manual_seed(0))[0]
    truth = ops.attention(q.double(), k.double(), v.double(), impl="reference").out
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        eager = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    rounding = torch.finfo(q.dtype).eps * float(truth.abs().max())
    budget = 2 * (float((eager - truth).abs().max()) + rounding)
    for name, function in dense_backends().items():
        out = function(q, k, v)
        out = out[0] if isinstance(out, tuple) else out
        error = float((out - truth).abs().max())
        passed = error <= budget
        good &= passed
        print(f"{'ok  ' if passed else 'FAIL'} {name:48s} out {error:.1e} <= {budget:.1e}")
    return good


class Bench:
    """Measures and prints rows."""

    def __init__(self, sparse: tuple[str, ...], budget_s: float, deadline: float) -> None:
        self.sparse = sparse
        self.paths = tuple(
            name.removeprefix("triton-") for name in sparse if name.startswith("triton-")
        )
        self.budget_s = budget_s
        self.deadline = deadline
        self.rows: list[Row] = []

    def add(
        self,
        backend: str,
        op: str,
        shape: Shape,
        function: Callable[..., object],
        sets: list[tuple[Tensor, ...]],
        *,
        block: Block | None = None,
        density: float = 1.0,
        best: float | None = None,
        products: int = 2,
        config: Config | None = None,
    ) -> float:
        """Times ``function``; ``products`` counts the matrix products (2: scores and values)."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        ms, spread, repeats = measure(function, sets, self.budget_s)
        flops = 2 * products * shape.heads * shape.tokens**2 * shape.dim * density
        share = best * density / ms if best is not None else None
        row = Row(
            backend, op, str(shape), block, round(density, 4), ms, spread, repeats,
            flops / ms / 1e9, share, None if config is None else str(tuple(config)),
        )  # fmt: skip
        self.rows.append(row)
        shown = "" if share is None else f"{100 * share:6.1f} %"
        print(
            f"{backend:18s} {op:10s} {row.shape:16s} {block or '-'!s:>9} {density:7.4f} "
            f"{ms:9.3f} ms ±{100 * spread:4.1f} % {row.tflops:7.1f} TFLOP/s {shown} "
            f"{row.config or ''}",
            flush=True,
        )
        return ms

    def dense(self, shape: Shape, sets: list[tuple[Tensor, ...]], fast_only: bool) -> float:
        """Times the dense kernels and returns the best, in ms."""
        times = []
        for name, function in dense_backends().items():
            if name != "sdpa-flash" or not fast_only:
                times.append(self.add(name, "attention", shape, function, sets))
        return min(times)

    def ours(self, shape: Shape, sets: list[tuple[Tensor, ...]], best: float) -> None:
        rng = torch.Generator("cuda").manual_seed(1)
        if 1.0 in shape.densities:
            for path in self.paths:
                if _refused(path, sets[0], None):
                    continue
                self.add(
                    f"triton-{path}", "attention", shape,
                    lambda q, k, v, path=path: launch(_call(q, k, v, None), path),
                    sets, best=best,
                )  # fmt: skip
        for block in shape.blocks:
            for density in shape.densities:
                mask = random_mask(shape, block, density, rng)
                achieved = float(mask.kv_num_blocks.double().mean()) / mask.shape[-1]
                for path in self.paths:
                    if _refused(path, sets[0], mask):
                        continue
                    self.add(
                        f"triton-{path}", "attention", shape,
                        lambda q, k, v, m=mask, path=path: launch(_call(q, k, v, m), path),
                        sets, block=block, density=achieved, best=best,
                    )  # fmt: skip
                if "flash-attn-4" in self.sparse:
                    self.add(
                        "flash-attn-4", "attention", shape,
                        lambda q, k, v, m=mask: ops.attention(q, k, v, m, impl="flash-attn-4"),
                        sets, block=block, density=achieved, best=best,
                    )  # fmt: skip

    def passes(self, shape: Shape, sets: list[tuple[Tensor, ...]], best: float) -> None:
        """The passes that search for masks, as a share of one dense attention."""
        self.add(
            "triton", "row_lse", shape,
            lambda q, k, v: ops.row_lse(q, k, impl="triton"),
            sets, best=best, products=1,
        )  # fmt: skip
        lse = ops.row_lse(*sets[0][:2], impl="triton")
        for block in shape.blocks:
            self.add(
                "triton", "block_mass", shape,
                lambda q, k, v, b=block: ops.block_mass(q, k, lse, b, impl="triton"),
                sets, block=block, best=best, products=1,
            )  # fmt: skip

    def summaries(self, shape: Shape, sets: list[tuple[Tensor, ...]], best: float) -> None:
        """What summaries of skipped blocks and the choice of blocks cost, at density 0.1."""
        rng = torch.Generator("cuda").manual_seed(1)
        options = {"impl": "triton"}
        for block in shape.blocks:
            mask = random_mask(shape, block, 0.1, rng)
            packed = mask.pack()
            achieved = float(mask.kv_num_blocks.double().mean()) / mask.shape[-1]
            scores = torch.rand(packed.shape, generator=rng, device="cuda")
            count = torch.full((1, 1), round(0.1 * mask.shape[-1]), device="cuda")
            made = {
                order: ops.summarize(
                    *sets[0][1:], mask.block[1], first_order=order == "first", **options
                )
                for order in ("zeroth", "first")
            }

            def compensated(
                q: Tensor, k: Tensor, v: Tensor, order: str, mask: PackedMask = packed
            ) -> ops.Attended:
                summary = ops.summarize(
                    k, v, mask.block[1], first_order=order == "first", **options
                )
                return ops.attention(q, k, v, mask, summary=summary, **options)

            calls: dict[str, Callable[..., object]] = {
                "kept": lambda q, k, v, m=mask: ops.attention(q, k, v, m, **options),
                "kept, packed": lambda q, k, v, m=packed: ops.attention(q, k, v, m, **options),
                "zeroth, kernel": lambda q, k, v, m=mask, s=made["zeroth"]: ops.attention(
                    q, k, v, m, summary=s, **options
                ),
                "first, kernel": lambda q, k, v, m=mask, s=made["first"]: ops.attention(
                    q, k, v, m, summary=s, **options
                ),
                "zeroth, all": lambda q, k, v: compensated(q, k, v, "zeroth"),
                "first, all": lambda q, k, v: compensated(q, k, v, "first"),
            }
            for name, function in calls.items():
                self.add(
                    "triton", name, shape, function, sets,
                    block=block, density=achieved, best=best,
                )  # fmt: skip
            if "flash-attn-4" in self.sparse:
                for order, summary in made.items():
                    self.add(
                        "flash-attn-4", f"{order}, kernel", shape,
                        lambda q, k, v, m=mask, s=summary: ops.attention(
                            q, k, v, m, summary=s, impl="flash-attn-4"
                        ),
                        sets, block=block, density=achieved, best=best,
                    )  # fmt: skip
            for order in made:
                self.add(
                    "triton", f"summarize {order}", shape,
                    lambda q, k, v, o=order, b=mask.block[1]: ops.summarize(
                        k, v, b, first_order=o == "first", **options
                    ),
                    sets, block=block, best=best, products=0,
                )  # fmt: skip
            self.add(
                "triton", "top_blocks", shape,
                lambda q, k, v, s=scores, c=count, b=block: ops.top_blocks(
                    s, c, b, shape.tokens, **options
                ),
                sets, block=block, best=best, products=0,
            )  # fmt: skip
            self.add(
                "triton", "lists", shape, lambda q, k, v, m=packed: expand(m),
                sets, block=block, best=best, products=0,
            )  # fmt: skip

    def eight_bits(self, shape: Shape, sets: list[tuple[Tensor, ...]], best: float) -> None:
        """Attention with products of 8 bits, and the rounding of its operands alone."""
        rng = torch.Generator("cuda").manual_seed(1)
        for block in shape.blocks:
            for density in shape.densities:
                mask = random_mask(shape, block, density, rng)
                achieved = float(mask.kv_num_blocks.double().mean()) / mask.shape[-1]
                for precision in ops.PRECISIONS:
                    self.add(
                        "triton", precision, shape,
                        lambda q, k, v, m=mask, p=precision: ops.attention(
                            q, k, v, m, precision=p, impl="triton"
                        ),
                        sets, block=block, density=achieved, best=best,
                    )  # fmt: skip
            for precision in ops.FP8:
                self.add(
                    "triton", f"round {precision.removeprefix('fp8_')}", shape,
                    lambda q, k, v, m=mask, p=precision: quantize(
                        replace(_call(q, k, v, m), precision=p), fragments=True
                    ),
                    sets, block=block, best=best, products=0,
                )  # fmt: skip

    def shape(self, shape: Shape, sets: list[tuple[Tensor, ...]], parts: list[str]) -> None:
        """Times ``parts`` for one shape."""
        best = self.dense(shape, sets, fast_only=1.0 not in shape.densities)
        if "attention" in parts:
            self.ours(shape, sets, best)
        if "passes" in parts and 1.0 in shape.densities:
            self.passes(shape, sets, best)
        if "summaries" in parts and 1.0 in shape.densities:
            self.summaries(shape, sets, best)
        if "fp8" in parts:
            self.eight_bits(shape, sets, best)
        if "tune" in parts and shape.tokens in (32_768, 17_792):
            for block in (block for block in shape.blocks if isinstance(block, int)):
                self.tune(shape, sets, best, block)

    def tune(self, shape: Shape, sets: list[tuple[Tensor, ...]], best: float, block: int) -> None:
        """Launch parameters around the defaults at density 0.25."""
        mask = random_mask(shape, block, 0.25, torch.Generator("cuda").manual_seed(2))
        tiles = [
            (q, k)
            for q in (64, 128)
            for k in (64, 128)
            if q <= block and k <= block and q + k < 256
        ]
        # The kernel for Hopper has no launch parameters.
        for path in (path for path in self.paths if path != "hopper"):
            for tile_q, tile_k in tiles:
                for warps in (4, 8) if tile_q == 128 else (4,):
                    for stages in (2, 3):
                        config = Config(tile_q, tile_k, warps, stages)
                        try:
                            self.add(
                                f"triton-{path}", "tune", shape,
                                lambda q, k, v, p=path, c=config: launch(
                                    _call(q, k, v, mask), p, c
                                ),
                                sets, block=block, density=0.25, best=best, config=config,
                            )  # fmt: skip
                        except triton.runtime.errors.OutOfResources as error:
                            print(f"triton-{path} {tuple(config)}: {error}")


def _refused(path: str, operands: tuple[Tensor, ...], mask: BlockMask | None) -> bool:
    """Whether the kernel for Hopper cannot take a call; the others take all that are timed."""
    return path == "hopper" and bool(hopper_reasons(_call(*operands, mask)))


def _call(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> ops.AttentionCall:
    return ops.AttentionCall(q, k, v, mask, None, q.shape[-1] ** -0.5)


def machine() -> dict[str, str]:
    """The GPU, its clocks and the versions."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        query = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.splitlines()[0]  # fmt: skip
        found = dict(zip(fields.split(","), (x.strip() for x in query.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError):
        found = {"name": torch.cuda.get_device_name()}
    major, minor = torch.cuda.get_device_capability()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    for package in ("flash-attn-4", "nvidia-cutlass-dsl", "fa3-fwd"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {**found, "capability": f"{major}.{minor}", **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="one shape, three densities")
    parser.add_argument(
        "--parts",
        default="attention,passes,summaries",
        help="what to time: attention, passes (mask search), summaries (of skipped blocks), fp8 "
        "(products of 8 bits), tune (launch parameters)",
    )
    parser.add_argument("--shapes", help="only these, e.g. 6x8192x64,12x32768x128")
    parser.add_argument("--no-tma", action="store_true", help="leave the TMA path out")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds per measurement")
    parser.add_argument(
        "--budget-s", type=float, default=float("inf"),
        help="seconds in all, the check included; what does not fit is left out",
    )  # fmt: skip
    parser.add_argument("--sparse", help="only these sparse kernels, e.g. triton-tma,flash-attn-4")
    parser.add_argument(
        "--write-table", type=Path, nargs="+", metavar="RESULTS",
        help="make the table of the machine that these files were measured on, and stop",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.write_table:
        print(write_table(arguments.write_table))
        return 0
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts takes {', '.join(PARTS)}, got {sorted(unknown)}")
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")

    began = time.perf_counter()
    probe = torch.empty(1, 128, 1, 64, device="cuda", dtype=torch.bfloat16)
    refusals = tma_reasons(_call(probe, probe, probe, None))
    tma = not arguments.no_tma and not refusals
    kernels = ["triton-pointer", *(["triton-tma", "triton-hopper"] if tma else [])]
    if any(impl.name == "flash-attn-4" for impl in ops.implementations("attention")):
        kernels.append("flash-attn-4")
    sparse = arguments.sparse.split(",") if arguments.sparse else kernels
    if set(sparse) - set(kernels):
        parser.error(f"--sparse takes {', '.join(kernels)} here, got {arguments.sparse}")
    if not correct(tma):
        print("results are wrong; no speed is measured")
        return 1
    print(f"checked in {time.perf_counter() - began:.0f} s; {machine()}")

    bench = Bench(tuple(sparse), arguments.budget, began + arguments.budget_s)
    rng = torch.Generator("cuda").manual_seed(0)
    for shape in QUICK_SHAPES if arguments.quick else SHAPES:
        if arguments.shapes is not None and str(shape) not in arguments.shapes.split(","):
            continue
        try:
            bench.shape(shape, inputs(shape, rng), parts)
        except OutOfTime:
            print(f"{arguments.budget_s:.0f} s are spent in {shape}; the rest is left out")
            arguments.shapes = ""
        if arguments.output:  # after every shape, so that an interrupted run leaves its part
            write_rows(arguments.output, {"machine": machine()}, map(asdict, bench.rows))
    print(f"took {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
