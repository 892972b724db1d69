"""Comparison at equal achieved density, and the worst case beside the mean.

What a method calls its sparsity is not what it computes: text, forced blocks, ragged borders and
adaptive budgets all move it. So every arm is turned until it computes the same share, and then
compared.

Source: The Sparse Frontier, arXiv 2504.17768, which compares sparse attention at measured density
and reports the worst task.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dit_sparse.eval.arms import NOISE_FLOOR, Arm
from dit_sparse.eval.compare import Request, Run, prepare

if TYPE_CHECKING:
    from dit_sparse import Report, SparseConfig

# How near the achieved density must come to the one asked for.
TOLERANCE = 0.01
# Measurements in a row that bring no new density before the search gives up.
_MOST_REPEATS = 3
# The share asked for at the lower end: no method keeps less than its forced blocks.
_LEAST_SHARE = 1e-3


@dataclass(frozen=True)
class Matched:
    """A configuration that computes about as much as was asked for.

    Attributes:
        config: The configuration whose density is the nearest to the target of all that were tried.
        density: What it achieves.
        target: What was asked for.
        tries: Every (share, density) that was measured, in order.
    """

    config: SparseConfig
    density: float
    target: float
    tries: tuple[tuple[float, float], ...]


def bisect_density(
    make_config: Callable[[float], SparseConfig],
    target: float,
    measure: Callable[[SparseConfig], float],
    *,
    tolerance: float = TOLERANCE,
    most_tries: int = 10,
) -> Matched:
    """Turns the budget of a method until its achieved density is ``target``.

    The first try asks for ``target`` itself, which is where most methods with a fixed budget
    already are. From then on the interval that holds the target is cut where a straight line
    between its ends would meet it, but never nearer than a tenth to an end.

    Args:
        make_config: The configuration that is asked to keep a share in (0, 1]. Its density must not
            fall as the share rises, and is taken to be 1 at 1.
        target: Density to reach, in (0, 1).
        measure: Achieved density of a configuration; costs a generation.
        tolerance: Largest difference that ends the search.
        most_tries: Measurements at most. Methods that know only a few densities (a stride, a number
            of sets) may never come within the tolerance; the nearest is returned.

    Raises:
        ValueError: If the target, the tolerance or the number of tries is out of range.
    """
    _check_target(target)
    if not tolerance > 0 or most_tries < 1:
        raise ValueError(
            f"tolerance must be positive and most_tries at least 1, got {tolerance}, {most_tries}"
        )
    low: tuple[float, float | None] = (_LEAST_SHARE, None)
    high = (1.0, 1.0)
    known: dict[SparseConfig, float] = {}
    tries: list[tuple[float, float]] = []
    share, repeats = target, 0
    while len(tries) < most_tries:
        config = make_config(share)
        if config not in known:
            known[config] = measure(config)
            tries.append((share, known[config]))
        density = known[config]
        if abs(density - target) <= tolerance:
            break
        # A density seen before, time and again: blocks are whole, and there is none in between.
        repeats = repeats + 1 if density in (low[1], high[1]) else 0
        if repeats == _MOST_REPEATS:
            break
        if density < target:
            low = (share, density)
        else:
            high = (share, density)
        if high[0] <= low[0] * (1 + 1e-6) or _same(make_config, low[0], high[0], known):
            break
        share = _between(low, high, target)
    best = min(known, key=lambda config: abs(known[config] - target))
    return Matched(best, known[best], target, tuple(tries))


def _check_target(target: float) -> None:
    if not 0 < target < 1:
        raise ValueError(
            f"a density to compare at must be between 0 and 1, got {target}; 1 would be dense"
        )


def _same(
    make_config: Callable[[float], SparseConfig],
    low: float,
    high: float,
    known: dict[SparseConfig, float],
) -> bool:
    """Whether nothing new is between two shares: a whole number steps from one to the other."""
    between = [low + (high - low) * part / 16 for part in range(17)]
    return all(make_config(share) in known for share in between)


def _between(low: tuple[float, float | None], high: tuple[float, float], target: float) -> float:
    # A density that nobody measured is no end of a line.
    part = 0.5
    if low[1] is not None and high[1] > low[1]:
        part = min(max((target - low[1]) / (high[1] - low[1]), 0.1), 0.9)
    return low[0] + part * (high[0] - low[0])


def sparse_step_density(report: Report) -> float:
    """Mean density over the steps in which attention is sparse, of all self-attention layers.

    Warm-up is left out, because a target below its share of the steps could never be met. A layer
    that stays dense counts as 1 in as many calls as its fellows are sparse, so that keeping layers
    dense is paid for.
    """
    sparse = [entry["phases"] for entry in report.layers]
    calls = [phases.get("sparse", 0) + phases.get("refresh", 0) for phases in sparse]
    most = max(calls, default=0)
    if most == 0:
        return 1.0
    kept = total = 0.0
    for entry, count in zip(report.layers, calls, strict=True):
        heads = entry["head_density"]
        density = 1.0 if heads is None else statistics.fmean(heads)
        kept += density * (count or most)
        total += count or most
    return kept / total


def at_density(
    request: Request,
    target: float,
    *,
    tolerance: float = TOLERANCE,
    pipe: Any = None,
    enable: Callable[[Any, Any], Any] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> tuple[Request, Any, dict[str, Matched]]:
    """A request whose arms all compute about the share ``target`` in their sparse steps.

    Densities are measured on the first prompt, a generation (without decoding) a try. The dense arm
    and the noise floor stay as they are.

    Args:
        request: What to compare.
        target: Density to reach, see :func:`sparse_step_density`.
        tolerance: As in :func:`bisect_density`.
        pipe, enable, on_stage: As in :func:`~dit_sparse.eval.compare.run_comparison`.

    Returns:
        The request to run, the pipeline (loaded, for that run), and what was found, by the label of
        each arm that was turned.

    Raises:
        ValueError: If an arm has no setting for its density, before anything is loaded.
    """
    _check_target(target)
    request = request.resolved()
    for arm in request.arms:
        if not _is_fixed(arm):
            arm.config.method.at_budget(target)
    engine = prepare(request, pipe=pipe, enable=enable, on_stage=on_stage)
    arms: list[Arm] = []
    found: dict[str, Matched] = {}
    for arm in request.arms:
        if _is_fixed(arm):
            arms.append(arm)
            continue

        def measure(config: SparseConfig, label: str = arm.label) -> float:
            density = sparse_step_density(engine.report(Arm(label, config)))
            if on_stage is not None:
                on_stage(f"{label}: density {density:.3f}")
            return density

        def make_config(share: float, config: SparseConfig = arm.config) -> SparseConfig:
            return replace(config, method=config.method.at_budget(share))

        matched = bisect_density(make_config, target, measure, tolerance=tolerance)
        found[arm.label] = matched
        arms.append(Arm(f"{arm.label}@{matched.density:.3f}", matched.config))
    return replace(request, arms=tuple(arms)), engine.pipe, found


def _is_fixed(arm: Arm) -> bool:
    return arm.is_dense or arm.label == NOISE_FLOOR


@dataclass(frozen=True)
class Summary:
    """One arm over all prompts.

    Attributes:
        method: Label of the arm.
        psnr: Mean PSNR of clips, dB; infinite if one is identical to dense.
        psnr_worst: The lowest PSNR of a clip.
        ssim: Mean SSIM.
        ssim_worst: The lowest SSIM of a clip.
        worst_prompt: The prompt of the lowest PSNR.
    """

    method: str
    psnr: float
    psnr_worst: float
    ssim: float
    ssim_worst: float
    worst_prompt: str


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Mean and worst case of every arm but dense, in the order of the first prompt."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        if run.quality is not None:
            arms.setdefault(run.method, []).append(run)
    result = []
    for label, group in arms.items():
        qualities = [(run.quality, run.prompt) for run in group if run.quality is not None]
        psnr = [quality.psnr_clip for quality, _ in qualities]
        ssim = [quality.ssim_mean for quality, _ in qualities]
        worst = min(range(len(psnr)), key=psnr.__getitem__)
        result.append(
            Summary(
                label,
                statistics.fmean(psnr),
                psnr[worst],
                statistics.fmean(ssim),
                min(ssim),
                qualities[worst][1],
            )
        )
    return result
