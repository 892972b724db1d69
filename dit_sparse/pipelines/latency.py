"""How long something takes beside something else, and settings at which both take equally long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


def relative_cost(
    run: Callable[[], object],
    reference: Callable[[], object],
    device: torch.device,
    turns: tuple[int, int] = (7, 50),
    seconds: float = 1.0,
) -> tuple[float, float]:
    """Time of ``run`` over that of ``reference``.

    On CUDA it is the device's own time, that of a replayed graph: launching a kernel takes the host
    longer than a small one runs, which a whole model hides. On a CPU it is the time of the process,
    which its neighbours change least. The two take turns, so that clocks that change over time
    change both, and of each the shortest time counts: whatever else happens on a machine only ever
    adds.

    Args:
        run: What to time. A first turn, which may compile and allocate, is not timed.
        reference: What to compare it with.
        device: Where they compute.
        turns: Least and most turns that are timed.
        seconds: Time after which no more than the least are taken: what is short is repeated more.

    Returns:
        The ratio, and the seconds of ``reference``.
    """
    run()
    reference()
    if device.type == "cuda":
        run, reference = _replayed(run, device), _replayed(reference, device)
    pairs: list[tuple[float, float]] = []
    spent = 0.0
    while len(pairs) < turns[0] or (len(pairs) < turns[1] and spent < seconds):
        pairs.append((_seconds(run, device), _seconds(reference, device)))
        spent += sum(pairs[-1])
    shortest, unit = (min(times) for times in zip(*pairs, strict=True))
    return shortest / unit, unit


def _replayed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """What replays the kernels that ``run`` launches, without its host time."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        logger.warning(
            "%s cannot be captured in a CUDA graph, so that its time includes the host's (%s)",
            getattr(run, "__qualname__", run), error,
        )  # fmt: skip
        torch.cuda.synchronize(device)
        return run
    graph.replay()
    return graph.replay


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    started = time.process_time()
    run()
    return time.process_time() - started


def match_cost(
    cost_at: Callable[[float], float], start: float, tolerance: float = 0.05, rounds: int = 4
) -> tuple[float, float] | None:
    """The share of work that costs 1.

    Args:
        cost_at: Measured cost of a share in (0, 1]; grows with it, perhaps in steps.
        start: First share to try.
        tolerance: Deviation from 1 that counts as equal.
        rounds: Most measurements.

    Returns:
        The largest share found that costs no more, and its cost; None if every one cost more, as
        where a fixed part of the work alone does.
    """
    tried: list[tuple[float, float]] = []
    share = start
    for _ in range(rounds):
        tried.append((share, cost_at(share)))
        if abs(tried[-1][1] - 1) <= tolerance:
            break
        share = min(max(_next_share(tried), start / 8), 1.0)
        if any(share == other for other, _ in tried):
            break
    return max((point for point in tried if point[1] <= 1 + tolerance), default=None)


def _next_share(tried: list[tuple[float, float]]) -> float:
    share, cost = tried[-1]
    if len(tried) > 1:
        before, cost_before = tried[-2]
        slope = (cost - cost_before) / (share - before)
        if slope > 0:
            return share + (1 - cost) / slope
    return share / cost
