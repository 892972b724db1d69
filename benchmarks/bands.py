"""Banded attention against the same patterns as lists of blocks: correctness, then speed.

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
import json
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

from benchmarks.check_kernels import Case, Finding, _worst, build, poisoned_memory
from dit_sparse.bands import FULL, SKIP, BandMask, HeadPattern, half_width
from dit_sparse.kernels import ops
from dit_sparse.kernels.triton_attention import Config, choose_path
from dit_sparse.kernels.triton_band import launch
from dit_sparse.layout import TokenLayout


def diagonal(density: float, blocks: int) -> HeadPattern:
    return HeadPattern(half_width(density, blocks))


def multi_diagonal(density: float, blocks: int) -> HeadPattern:
    return HeadPattern(half_width(density, blocks), order="position_major")


def stripe(density: float, blocks: int) -> HeadPattern:
    return HeadPattern(columns=max(1, round(density * blocks)), shift=0.5)


@dataclass(frozen=True)
class BandCase:
    """Sizes of a call, its patterns and the hazards it contains.

    Attributes:
        name: Readable id.
        heads: Pattern of each head.
        grid: Video tokens (frames, height, width).
        text: Text tokens.
        order: Where the text stands.
        block: Tokens in a block.
        dim: Head dimension.
        batch: Batch size.
        padding: Marks keys invalid, at the end and in the middle, and fills them with NaN.
        memory: Layout in memory, see ``Case.layout``.
    """

    name: str
    heads: tuple[HeadPattern, ...]
    grid: tuple[int, int, int] = (3, 6, 12)
    text: int = 0
    order: str = "video_text"
    block: int = 64
    dim: int = 64
    batch: int = 1
    padding: bool = False
    memory: str = "blhd"

    @property
    def bands(self) -> BandMask:
        layout = TokenLayout(self.grid, self.text, self.order)  # type: ignore[arg-type]
        return BandMask(self.heads, self.block, layout)


FIVE = (
    FULL,
    SKIP,
    HeadPattern(1),
    HeadPattern(0, order="position_major"),
    HeadPattern(columns=2, shift=0.5),
)
BOTH = (
    HeadPattern(0, columns=2, order="position_major"),
    HeadPattern(0, columns=3, shift=0.9),
)
CASES = (
    BandCase("five", FIVE),
    BandCase("text-last", FIVE[2:], text=37, memory="fused"),
    BandCase("five-text-first", FIVE, (3, 5, 11), text=70, order="text_video", padding=True),
    BandCase("blocks-of-128", FIVE[3:], (2, 9, 17), text=20, block=128, dim=128),
    BandCase("even", FIVE[2:], (4, 6, 8)),
    BandCase("band-and-columns", BOTH, text=1, batch=2),
    BandCase("padding", (BOTH[0], FIVE[2]), padding=True, memory="bhld", dim=40),
    BandCase("image", FIVE[3:], (1, 13, 17), text=5, order="text_video"),
    BandCase("less-than-a-block", (HeadPattern(0), SKIP), (1, 3, 5), text=9),
    BandCase("all-skipped", (SKIP, SKIP), memory="strided", dim=40),
)
LARGE_CASES = (
    BandCase("large", FIVE + BOTH, (9, 15, 26), text=226, order="text_video", block=128),
    BandCase("large-128", FIVE + BOTH, (9, 15, 26), block=128, dim=128),
    BandCase("large-padding", FIVE + BOTH, (9, 15, 26), 256, block=128, dim=128, padding=True),
    BandCase("large-64", FIVE + BOTH, (13, 11, 17), batch=2, memory="bhld"),
)


@dataclass(frozen=True)
class Inputs:
    """Operands of one case, with NaN wherever no result may depend on them."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_valid: Tensor | None
    keep: Tensor  # the pairs that count, [batch, heads, tokens, tokens]

    def call(self, bands: BandMask) -> ops.BandedCall:
        scale = self.q.shape[-1] ** -0.5
        return ops.BandedCall(self.q, self.k, self.v, bands, self.key_valid, scale)


def build_bands(case: BandCase, dtype: torch.dtype, device: str) -> Inputs:
    """Random operands of ``case``; keys and values that no query may see hold NaN."""
    bands = case.bands
    tokens, heads = bands.layout.tokens, len(case.heads)
    x = build(
        Case(
            case.name,
            (tokens, tokens),
            case.dim,
            None,
            padding=case.padding,
            layout=case.memory,
            batch=case.batch,
            heads=heads,
        ),
        dtype,
        device,
    )
    keep = torch.stack([bands.tokens(head) for head in range(heads)]).to(device)
    unseen = ~keep.any(1).T.expand(case.batch, -1, -1)  # [batch, tokens, heads]
    x.k.masked_fill_(unseen[..., None], float("nan"))
    x.v.masked_fill_(unseen[..., None], float("nan"))
    keep = keep.expand(case.batch, -1, -1, -1)
    if x.key_valid is not None:
        keep = keep & x.key_valid[:, None, None]
    return Inputs(x.q, x.k, x.v, x.key_valid, keep)


def check(case: BandCase, dtype: torch.dtype, device: str, path: str) -> list[Finding]:
    """Errors of banded attention, with the budgets of ``benchmarks.check_kernels``.

    Args:
        case: What to compute.
        dtype: Dtype of the inputs.
        device: Where.
        path: An implementation as users name it (``"triton"``, ``"cpu"``), or a path of the Triton
            launcher.
    """
    x, bands = build_bands(case, dtype, device), case.bands
    with poisoned_memory():
        if path in ("pointer", "tma"):
            found = launch(x.call(bands), path)
        else:
            found = ops.banded_attention(x.q, x.k, x.v, bands, key_valid=x.key_valid, impl=path)
    truth = ops.banded_attention(
        x.q.double(), x.k.double(), x.v.double(), bands, key_valid=x.key_valid, impl="reference"
    )
    q, k, v = (t.nan_to_num(0.0).transpose(1, 2) for t in (x.q, x.k, x.v))
    live = x.keep.any(-1)
    exact, mine = truth.out.transpose(1, 2), found.out.transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=x.keep)[live]
    scale = case.dim**-0.5
    scores = scale * (q.float() @ k.float().mT)
    eager = scores.masked_fill(~x.keep, float("-inf")).logsumexp(-1)
    size = float((scale * (q.float().abs() @ k.float().abs().mT)).max())
    largest = float(exact.abs().max())
    return [
        Finding(
            "out",
            _worst(mine[live], exact[live]),
            2 * (_worst(theirs, exact[live]) + torch.finfo(dtype).eps * largest),
        ),
        Finding("empty rows", _worst(mine[~live], torch.zeros_like(mine[~live])), 0.0),
        Finding(
            "lse",
            _worst(found.lse, truth.lse),
            2 * (_worst(eager, truth.lse) + torch.finfo(torch.float32).eps * size),
        ),
    ]


def check_far(device: str) -> list[Finding]:
    """The last blocks of sequences beyond 2**31 elements, in both token orders; about 25 GiB."""
    layout, heads, dim, block = TokenLayout((110, 50, 80)), 40, 128, 128
    kinds = (HeadPattern(0), HeadPattern(0, order="position_major"))
    bands = BandMask(kinds * (heads // 2), block, layout)
    rng = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    q, k, v = (torch.zeros(1, layout.tokens, heads, dim, **options) for _ in range(3))
    # The last block in the order of its head, ragged or whole, attends to itself alone.
    size = layout.tokens % block or block
    places = []
    for kind in range(2):
        order = bands.ordering(kinds[kind].order, torch.device(device))
        last = torch.arange(layout.tokens - size, layout.tokens, device=device)
        places.append(last if order is None else order.perm[last])
        for tensor in (q, k, v):
            drawn = torch.randn(1, size, heads // 2, dim, generator=rng, **options)
            tensor[:, places[kind], kind::2] = drawn
    found = ops.banded_attention(q, k, v, bands, impl="triton")
    findings = []
    for kind in range(2):
        small = [t[:, places[kind], kind::2].transpose(1, 2) for t in (q, k, v)]
        truth = F.scaled_dot_product_attention(*(t.double() for t in small))
        theirs = F.scaled_dot_product_attention(*small)
        rounding = torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
        mine = found.out[:, places[kind], kind::2].transpose(1, 2)
        budget = 2 * (_worst(theirs, truth) + rounding)
        findings.append(Finding(kinds[kind].order, _worst(mine, truth), budget))
    return findings


def tma_refused(case: BandCase, dtype: torch.dtype, device: str) -> bool:
    """Whether ``case`` cannot take the TMA path."""
    x = build_bands(case, dtype, device)
    return choose_path(ops.AttentionCall(x.q, x.k, x.v, None, None, 1.0)) != "tma"


@dataclass(frozen=True)
class Shape:
    """One attention call of a real model, batch 1."""

    model: str
    grid: tuple[int, int, int]
    heads: int
    dim: int
    text: int = 0
    order: str = "video_text"
    densities: tuple[float, ...] = (0.25, 0.125)
    block: int = 128

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.text, self.order)  # type: ignore[arg-type]


SHAPES = (
    Shape("Wan2.1-1.3B 480p", (21, 30, 52), 12, 128),
    Shape("CogVideoX-5B", (13, 30, 45), 48, 64, 226, "text_video"),
    Shape("HunyuanVideo 720p", (33, 45, 80), 24, 128, 256),
)
TOY = Shape("toy", (2, 5, 8), 3, 64, 3, densities=(0.5,), block=64)


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
    blocks = BandMask((FULL,), shape.block, shape.layout).video_blocks
    kinds = {
        "diagonal": diagonal(density, blocks),
        "multi_diagonal": multi_diagonal(density, blocks),
        "vertical_stripe": stripe(density, blocks),
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


def correct(cases: tuple[BandCase, ...], device: str, dtype: torch.dtype) -> bool:
    """Whether banded attention is right in every case, on every path."""
    good = True
    for case in cases:
        for path in ("pointer", "tma"):
            if path == "tma" and tma_refused(case, dtype, device):
                continue
            findings = check(case, dtype, device, path)
            good &= all(f.passed for f in findings)
            _report(path, case.name, findings)
    if device != "cpu":
        findings = check_far(device)
        good &= all(f.passed for f in findings)
        _report("triton", "past 2**31 elements", findings)
    return good


def _report(path: str, name: str, findings: list[Finding]) -> None:
    passed = all(f.passed for f in findings)
    details = "  ".join(f"{f.quantity} {f.error:.1e} <= {f.budget:.1e}" for f in findings)
    print(f"{'ok  ' if passed else 'FAIL'} {path:8s} {name:28s} {details}", flush=True)


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
            options.output.parent.mkdir(parents=True, exist_ok=True)
            content = {"machine": machine(), "dtype": str(dtype), "rows": [asdict(r) for r in rows]}
            options.output.write_text(json.dumps(content, indent=1) + "\n")
        if options.tune:
            tune(shape, device, dtype, options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
