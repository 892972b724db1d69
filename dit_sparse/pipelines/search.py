"""Sparse-vDiT's offline search: measures every pattern of every head, and writes a plan.

The model generates the calibration captions as it always does; in each self-attention call all
patterns of all heads are computed beside the dense output and compared with it.

Source: arXiv 2506.03065, algorithm 1 of the appendix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from dit_sparse.methods.base import ModelIdentity
from dit_sparse.methods.plan import DENSE, MODE_NAMES, Mode, Plan, PlanStep
from dit_sparse.pipelines.calibration import COSTS, Calibrator
from dit_sparse.pipelines.search_state import SearchState
from dit_sparse.pipelines.selection import choose, fit_epsilon, fit_price, mean_cost, mean_loss
from dit_sparse.processors.processor import enable_sparse_attention

STRATEGIES = ("greedy", "stored")

# Generates one caption and calls back after every denoising step.
Generate = Callable[[str, Callable[[], None]], None]
# Phase, caption number and denoising steps done of it.
Progress = Callable[[str, int, int], None]


def candidate_modes(
    names: tuple[str, ...] = MODE_NAMES,
    densities: tuple[float, ...] = (0.5, 0.25, 0.125),
    shifts: int = 2,
) -> tuple[Mode, ...]:
    """The modes to search among: every pattern at every density, dense first.

    Args:
        names: Out of ``MODE_NAMES``; dense is always one.
        densities: Of the sparse patterns.
        shifts: How many places of the stripes are tried, evenly spread over their spacing.

    Raises:
        ValueError: If a name or a value is not usable.
    """
    if shifts < 1:
        raise ValueError(f"shifts must be at least 1, got {shifts}")
    modes = [DENSE]
    for name in dict.fromkeys(names):
        if name == "vertical_stripe":
            places = [i / shifts for i in range(shifts)]
            modes += [Mode(name, density, shift) for density, shift in product(densities, places)]
        elif name in ("dense", "skip"):
            modes += [Mode(name)] if name == "skip" else []
        else:
            modes += [Mode(name, density) for density in densities]
    return tuple(dict.fromkeys(modes))


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        modes: Candidates, dense first.
        block: Tokens in a block.
        strategy: ``"greedy"``: chosen outputs replace the dense ones and feed the next layers and
            steps, as in the paper. ``"stored"``: all losses are measured on the dense trajectory.
        cost: ``"nominal"``: the share of pairs that a mode computes. ``"measured"``: its latency
            over that of dense, at the very shape, reordering included.
        price: The paper's lambda, or None to find the one that meets ``target_cost``.
        epsilon: The paper's threshold, or None for price x cost of dense, see
            :func:`~dit_sparse.pipelines.selection.choose`; where only ``price`` is given together
            with a target, it is found.
        target_cost: Mean cost over all heads, layers and steps that the plan may have.
        warmup: Dense steps at the beginning: a count (int) or a share (float).

    Raises:
        ValueError: If these do not determine one search.
    """

    modes: tuple[Mode, ...] = field(default_factory=candidate_modes)
    block: int = 64
    strategy: str = "greedy"
    cost: str = "measured"
    price: float | None = None
    epsilon: float | None = None
    target_cost: float | None = None
    warmup: int | float = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}")
        if self.cost not in COSTS:
            raise ValueError(f"cost must be one of {tuple(COSTS)}, got {self.cost!r}")
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")
        if len(self.modes) < 2 or self.modes[0] != DENSE:
            raise ValueError("expected dense and at least one other mode, got nothing to choose")
        if self.price is None and self.target_cost is None:
            raise ValueError("expected a lambda or a target cost, got neither")
        if self.price is not None and not self.price >= 0:
            raise ValueError(f"lambda must be at least 0, got {self.price}")
        if self.target_cost is not None and not 0 <= self.target_cost <= 1:
            raise ValueError(f"the target cost must be in [0, 1], got {self.target_cost}")
        if self.epsilon is not None and (self.price is None or self.target_cost is not None):
            raise ValueError("epsilon goes with a lambda and without a target cost")


@dataclass
class SearchResult:
    """A plan and what it was chosen from."""

    plan: Plan
    price: float
    epsilon: float
    costs: list[float]
    mean_cost: float
    mean_loss: float


def search(
    pipe: Any,
    generate: Generate,
    captions: tuple[str, ...],
    settings: SearchSettings,
    state: SearchState,
    provenance: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> SearchResult:
    """Searches a plan for the transformers of ``pipe``.

    Losses are averaged over captions and CFG branches; in a greedy search over those that came so
    far, so the last one sees the mean of all. Where a target cost is to be met by a greedy search,
    a pass over the dense trajectory finds the price first.

    Args:
        pipe: A diffusers pipeline.
        generate: Generates one caption with it, from a fixed seed: an interrupted search repeats
            generations and expects the same.
        captions: What to calibrate on.
        settings: How to search.
        state: Where measurements are kept; saved after every denoising step.
        provenance: Plain data to put into the plan.
        on_progress: Called after every denoising step.

    Raises:
        ValueError: If the target cannot be reached, the pipeline cannot be searched, or the state
            holds another kind of costs.
    """
    calibrator = Calibrator(settings.modes, settings.block, settings.cost, settings.warmup, state)
    known = state.facts.get("costs", {})
    if known and settings.cost not in known:
        # Nothing would measure them where a generation is not repeated.
        raise ValueError(
            f"the state holds {', '.join(known)} costs, not {settings.cost}; give the same cost or "
            "another state"
        )
    with enable_sparse_attention(pipe, "dense") as processor:
        for binding in processor.bindings:
            binding.attend = calibrator.attend
        identity = processor.bindings[0].identity

        def run(phase: str, rule: tuple[float, float | None] | None) -> None:
            calibrator.begin_phase(rule)
            for number, caption in enumerate(captions):
                generation = calibrator.generation = f"{phase}/{number}"
                if generation in state.facts["finished"]:
                    calibrator.add_finished(generation)
                    continue
                done = 0

                def step(phase: str = phase, number: int = number) -> None:
                    nonlocal done
                    done += 1
                    state.save()
                    if on_progress is not None:
                        on_progress(phase, number, done)

                generate(caption, step)
                state.facts["finished"].append(generation)
                state.save()

        price, epsilon = settings.price, settings.epsilon
        if settings.strategy == "stored" or settings.target_cost is not None:
            run("stored", None)
            price, epsilon = _fit(settings, calibrator)
        if settings.strategy == "greedy":
            assert price is not None
            run(f"greedy {price:.9g} {epsilon}", (price, epsilon))
            # Under the errors of earlier choices the losses are others.
            price, epsilon = _fit(settings, calibrator)
    assert price is not None
    steps, losses = calibrator.table()
    choice = choose(losses, calibrator.costs, price, epsilon)
    costs = calibrator.costs.tolist()
    shape = state.facts["shape"]
    result = SearchResult(
        plan=Plan(
            ModelIdentity(identity.kind, identity.config),
            shape["heads"],
            shape["dim"],
            tuple(shape["grid"]),
            settings.block,
            settings.modes,
            tuple(
                PlanStep(
                    round(min(max(calibrator.progress(place), 0.0), 1.0), 6),
                    place[0],
                    tuple(tuple(row) for row in table),
                )
                for place, table in zip(steps, choice.tolist(), strict=True)
            ),
            {},
        ),
        price=price,
        epsilon=price * costs[0] if epsilon is None else epsilon,
        costs=costs,
        mean_cost=mean_cost(choice, calibrator.costs),
        mean_loss=mean_loss(choice, losses),
    )
    result.plan.provenance.update(provenance or {}, search=_describe(settings, result, captions))
    return result


def _fit(settings: SearchSettings, calibrator: Calibrator) -> tuple[float, float | None]:
    """Price and threshold under the losses at hand."""
    if settings.target_cost is None:
        assert settings.price is not None
        return settings.price, settings.epsilon
    losses, costs = calibrator.table()[1], calibrator.costs
    if settings.price is not None:
        return settings.price, fit_epsilon(losses, costs, settings.target_cost, settings.price)
    return fit_price(losses, costs, settings.target_cost), None


def _describe(
    settings: SearchSettings, result: SearchResult, captions: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "strategy": settings.strategy,
        "cost": settings.cost,
        "costs": {str(m): round(c, 4) for m, c in zip(settings.modes, result.costs, strict=True)},
        "lambda": result.price,
        "epsilon": result.epsilon,
        "target_cost": settings.target_cost,
        "mean_cost": result.mean_cost,
        "mean_loss": result.mean_loss,
        "warmup": settings.warmup,
        "captions": list(captions),
    }
