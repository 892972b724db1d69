"""Where the time of one step goes: the kernels of a profile, by what they are for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

OPERATOR = "dit_sparse::self_attention"

# Shares of a sparse step that these may take.
GOALS = {
    "reorder": (0.03, ("reorder",)),
    "bookkeeping": (0.02, ("lists and selection", "mass and summaries")),
}
_DENSE = ("flash", "fmha", "cudnn")
# (category, whether inside our operator, parts of kernel names, parts of operator names); the first
# that matches. A kernel belongs to the innermost PyTorch operator that launched it.
_RULES: tuple[tuple[str, bool, tuple[str, ...], tuple[str, ...]], ...] = (
    ("sparse attention", True, ("_attention_fwd_kernel", "_banded_fwd", "_neighborhood_fwd"), ()),
    ("mass and summaries", True, ("_block_mass", "_summarize", "_row_lse"), ()),
    ("lists and selection", True, ("_lists_kernel", "_top_blocks"), ("topk", "sort", "cumsum")),
    ("dense attention", True, _DENSE, ("scaled_dot_product",)),
    ("attention elsewhere", False, _DENSE, ("scaled_dot_product",)),
    ("reorder", True, ("index_select", "indexSelect"), ("index_select", "gather", "aten::index")),
    ("copies inside", True, ("Memcpy", "Memset"), ("copy_", "clone", "contiguous", "cat")),
    ("other inside", True, (), ()),
    ("linear", False, ("gemm", "nvjet", "cutlass"), ("addmm", "aten::mm", "bmm", "convolution")),
    ("norm", False, ("norm",), ("norm",)),
    ("elementwise and other", False, (), ()),
)


def category(kernel: str, operators: Sequence[str]) -> str:
    """What a kernel is for.

    Args:
        kernel: Its name.
        operators: PyTorch operators around its launch, innermost first.
    """
    inside = any(OPERATOR in name for name in operators)
    innermost = operators[0] if operators else ""
    for name, where, kernels, within in _RULES:
        if where != inside:
            continue
        catch_all = not kernels and not within
        if (
            catch_all
            or any(part in kernel for part in kernels)
            or any(part in innermost for part in within)
        ):
            return name
    raise AssertionError("the last rules take everything")


@dataclass(frozen=True)
class Profile:
    """One step, profiled; milliseconds.

    Attributes:
        by_category: Kernel time by category, largest first; on a CPU that of operators.
        kernels: Calls by category.
        largest: The longest kernels: name, category, time, calls.
    """

    by_category: dict[str, float]
    kernels: dict[str, int]
    largest: list[tuple[str, str, float, int]]

    @property
    def total_ms(self) -> float:
        return sum(self.by_category.values())

    def verdicts(self) -> list[str]:
        """What :data:`GOALS` allow and what is taken."""
        lines = []
        for name, (goal, kinds) in GOALS.items():
            share = sum(self.by_category.get(kind, 0.0) for kind in kinds) / (self.total_ms or 1.0)
            word = "met" if share < goal else "missed"
            lines.append(f"{name}: {100 * share:.1f} %, goal below {100 * goal:g} % {word}")
        return lines


def profile_step(function: Callable[[], Any], device: torch.device, largest: int = 12) -> Profile:
    """Profiles one call of ``function``, which should have run before."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
    times: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for event in recorded.events():
        operators, parent = [], event
        while parent is not None:
            operators.append(parent.name)
            parent = parent.cpu_parent
        found = [(kernel.name, kernel.duration) for kernel in event.kernels]
        if device.type == "cpu":
            found = [("", event.self_cpu_time_total)]
        for kernel, microseconds in found:
            key = (kernel or event.name, category(kernel, operators))
            times[key] += microseconds / 1e3
            calls[key] += 1
    by_category: dict[str, float] = defaultdict(float)
    kernels: dict[str, int] = defaultdict(int)
    for (_, kind), ms in times.items():
        by_category[kind] += ms
    for (_, kind), count in calls.items():
        kernels[kind] += count
    order = sorted(by_category, key=by_category.__getitem__, reverse=True)
    longest = sorted(times, key=times.__getitem__, reverse=True)[:largest]
    return Profile(
        {kind: by_category[kind] for kind in order},
        {kind: kernels[kind] for kind in order},
        [(name, kind, times[name, kind], calls[name, kind]) for name, kind in longest],
    )
