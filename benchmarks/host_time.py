"""What a call costs the host: microseconds of Python before its kernels are queued.

``python -m benchmarks.host_time [--only WORDS] [--calls N] [--output FILE]`` prints one line for
each operation, kernel and step of a method. On CUDA the calls are queued without waiting for them,
and are so small that the device is done before the host. Without CUDA they are queued on
:mod:`~benchmarks.idle_device`; such figures compare versions of this package and are not those of a
machine with a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.idle_device import idle_device
from benchmarks.row_file import write_rows
from dit_sparse.kernels import (
    ops,
    residual,
    triton_attention,
    triton_common,
    triton_mask,
)
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.layout import TokenLayout
from dit_sparse.mask import PackedMask
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call, Method
from dit_sparse.methods.compensated_delta import CompensatedDelta
from dit_sparse.schedule import Step

HEADS, DIM, GRID = 6, 64, (4, 16, 16)
BLOCK = (128, 64)
STEPS = 50


@dataclass(frozen=True)
class Case:
    """One call to time.

    Attributes:
        name: What is called.
        call: Makes the call.
    """

    name: str
    call: Callable[[], object]


def _step_of(method: Method, first: int) -> Callable[[], object]:
    """A sparse step of ``method``, the first one of a generation behind it."""
    layout = TokenLayout(GRID)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = _operands(device)
    own = torch.zeros_like(q), torch.zeros(1, HEADS, layout.tokens, device=device)
    memory: dict = {}
    shared: dict = {}

    def attend(index: int) -> object:
        step = Step(index, STEPS, index / STEPS, "cond", 0)
        call = Call(
            q, k, v, layout, step, 0, 30, None, memory, None, "auto", lambda lse: own, shared=shared
        )
        return method.attend(call)

    for index in range(first):
        attend(index)
    return lambda: attend(first)


def _operands(device: str) -> tuple[torch.Tensor, ...]:
    tokens = TokenLayout(GRID).tokens
    return tuple(
        torch.randn(1, tokens, HEADS, DIM, device=device, dtype=torch.float16) for _ in range(3)
    )


def cases() -> Iterator[Case]:
    """Everything that is timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = _operands(device)
    tokens = q.shape[1]
    keep = torch.rand(1, HEADS, tokens // BLOCK[0], tokens // BLOCK[1], device=device) < 0.3
    packed = PackedMask.from_dense(keep, BLOCK, tokens)
    lists = packed.lists()
    unpacked = replace(lists, bits=None)
    valid = torch.ones(1, tokens, dtype=torch.bool, device=device)
    first, zeroth = (ops.summarize(k, v, 64, first_order=x) for x in (True, False))
    mass = torch.rand(keep.shape, device=device)
    count = torch.full((1, 1), 4, device=device)
    lse = torch.zeros(1, HEADS, tokens, device=device)
    order = TokenLayout(GRID).ordering((4, 4, 4)).to(device)

    def launch(
        path: triton_attention.Path, mask: object, summary: BlockSummary | None = None
    ) -> Callable[[], object]:
        call = ops.AttentionCall(q, k, v, mask, None, DIM**-0.5, summary)
        # As one that ops.attention makes for a signature that it knows.
        call.remember({})
        return lambda: triton_attention.launch(call, path)

    yield Case("launch pointer lists", launch("pointer", lists))
    yield Case("launch tma lists", launch("tma", lists))
    if not triton_attention.hopper_reasons(ops.AttentionCall(q, k, v, packed, None, 1.0)):
        yield Case("launch hopper lists", launch("hopper", lists))
        yield Case("launch hopper packed", launch("hopper", packed))
        yield Case("launch hopper packed first order", launch("hopper", packed, first))
    yield Case("attention dense", lambda: ops.attention(q, k, v))
    yield Case("attention lists", lambda: ops.attention(q, k, v, unpacked))
    yield Case("attention packed", lambda: ops.attention(q, k, v, packed))
    yield Case("attention packed padded", lambda: ops.attention(q, k, v, packed, key_valid=valid))
    yield Case("attention packed zeroth", lambda: ops.attention(q, k, v, packed, summary=zeroth))
    yield Case("attention packed first", lambda: ops.attention(q, k, v, packed, summary=first))
    yield Case("attention lists first", lambda: ops.attention(q, k, v, unpacked, summary=first))
    yield Case("summarize zeroth", lambda: ops.summarize(k, v, 64))
    yield Case("summarize first", lambda: ops.summarize(k, v, 64, first_order=True))
    yield Case("top_blocks", lambda: ops.top_blocks(mass, count, BLOCK, tokens, longest=4))
    yield Case("block_mass", lambda: ops.block_mass(q, k, lse, BLOCK))
    yield Case("row_lse", lambda: ops.row_lse(q, k))
    yield Case("expand", lambda: triton_mask.expand(packed))
    yield Case("reorder", lambda: ops.reorder(order.perm, q, k, v))
    yield Case("add residual", lambda: residual.add_residual(q, k, order=order))
    yield Case("step adaspa", _step_of(AdaSpa(block=BLOCK), 20))
    delta = CompensatedDelta(block=BLOCK)
    yield Case("step compensated_delta", _step_of(replace(delta, refresh="never"), 20))
    yield Case("step compensated_delta rows", _step_of(replace(delta, refresh="rows"), 20))


def host_time(call: Callable[[], object], calls: int, repeats: int) -> tuple[float, float]:
    """Seconds of one call: the least and the median of ``repeats`` means over ``calls``."""
    means = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - started) / calls)
    # The first one compiles.
    return min(means[1:]), statistics.median(means[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="words of a name, e.g. 'attention packed'")
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="writes the rows as JSON")
    arguments = parser.parse_args()
    if triton_common.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 launches nothing; unset it")
    real = torch.cuda.is_available()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with contextlib.nullcontext() if real else idle_device(), torch.no_grad():
        gc.disable()
        for case in cases():
            if not set(arguments.only.split()) <= set(case.name.split()):
                continue
            least, median = host_time(case.call, arguments.calls, arguments.repeats)
            rows.append({"name": case.name, "least_us": 1e6 * least, "median_us": 1e6 * median})
            print(f"{case.name:36} {1e6 * least:8.1f} us, median {1e6 * median:8.1f}", flush=True)
    if arguments.output is not None:
        device = torch.cuda.get_device_name() if real else "none: an empty driver"
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
        versions["python"] = platform.python_version()
        write_rows(arguments.output, {"device": device, "versions": versions}, rows)


if __name__ == "__main__":
    main()
