"""Random histories of generations against a plain model of what must be remembered.

The model knows what really happens: which generation, expert, branch and layer every call belongs
to. ``Run`` has to find that out from contexts, timesteps and layer indices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.run import Run
from dit_sparse.schedule import Schedule

LAYERS = 3
GRIDS = [(1, 1, 1), (2, 3, 4), (2, 4, 3)]


@dataclass(frozen=True)
class Plan:
    """One pipeline call.

    Attributes:
        tells: What the pipeline tells: ``"fields"``, a ``"name"`` only, or ``"nothing"``.
        known: Whether the scheduler's timesteps are known.
        steps: Denoising steps.
        order: 2 for a scheduler that evaluates every step but the first twice.
        grid: Tokens of the video.
        batch: Batch size of each branch; one or two of them.
        text: Text tokens of each branch.
        skip: Bit masks of skipped layers, one a pass, repeated.
        stop: Number of the pass in which it is interrupted, and the layer; the layer ``LAYERS``
            means after the pass.
        reset_at: Step before which the user calls ``reset``.
        ends: Whether the pipeline resets its models at the end.
    """

    tells: str
    known: bool
    steps: int
    order: int
    grid: tuple[int, int, int]
    batch: tuple[int, ...]
    text: tuple[int, int]
    skip: tuple[int, ...]
    stop: tuple[int, int] | None
    reset_at: int | None
    ends: bool


# Weighted towards what is interesting: calls that stop early and leave their state behind.
plans = st.builds(
    Plan,
    tells=st.sampled_from(["fields", "name", "nothing"]),
    known=st.booleans(),
    steps=st.integers(2, 4),
    order=st.sampled_from([1, 1, 2]),
    grid=st.sampled_from(GRIDS),
    batch=st.sampled_from([(1,), (2,), (1, 1), (1, 2), (2, 1)]),
    text=st.sampled_from([(0, 0), (1, 1), (0, 1), (2, 1)]),
    skip=st.sampled_from([(), ()]) | st.lists(st.integers(0, 2**LAYERS - 1), max_size=3).map(tuple),
    stop=st.sampled_from([None, *((n, layer) for n in range(6) for layer in (0, 1, LAYERS))]),
    reset_at=st.sampled_from([None, None, None, 1, 2, 3]),
    ends=st.sampled_from([False, False, True]),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Plan]:
    """Calls that resemble the one before, which is where states could be mixed up."""
    names = [f.name for f in fields(Plan)]
    history = [draw(plans)]
    for _ in range(draw(st.integers(1, 4))):
        changed = {"stop", *draw(st.lists(st.sampled_from(names), max_size=2))}
        fresh = draw(plans)
        kept = {name: getattr(history[-1], name) for name in names if name not in changed}
        history.append(replace(fresh, **kept))
    return history


class World:
    """Two experts, their runs, and the truth about them."""

    def __init__(self, compiled: bool, boundary: float, first_search: int) -> None:
        self.compiled = compiled
        self.searches = (first_search, 3)
        self.schedule = Schedule((first_search + 1, 4))
        # Timesteps below go to the second expert.
        self.boundary = boundary
        self.runs = [Run(), Run()]
        # By expert, branch and layer: the mask that must be there, in this generation only.
        self.masks: dict[tuple[int, Any, int], object] = {}
        # The steps in which these were found.
        self.found: dict[tuple[int, Any, int], int] = {}
        # By expert: the timesteps of this generation that its passes have seen.
        self.seen: list[list[float]] = [[], []]
        # By expert: what its last pass looked like from outside, unless it was interrupted inside.
        self.last: list[tuple[Any, float] | None] = [None, None]
        self.generation = 0
        self.used = 0

    def new_generation(self) -> None:
        self.generation += 1
        self.masks, self.found, self.seen = {}, {}, [[], []]

    def reset(self) -> None:
        for run in self.runs:
            run.end_generation()
        self.last = [None, None]
        self.masks, self.found, self.seen = {}, {}, [[], []]

    def play(self, plan: Plan) -> None:
        self.new_generation()
        levels = [1000.0 * (plan.steps - i) / plan.steps for i in range(plan.steps)]
        # A name that comes again at the first timestep counts as a restart. No scheduler repeats
        # the first of all, only that of a second expert or after a reset: masks are found again.
        starts_late = levels[-1] < self.boundary or plan.reset_at is not None
        twice = plan.order == 2 and not (plan.tells == "name" and starts_late)
        evaluations = [
            (step, again) for step in range(plan.steps) for again in range(1 + (twice and step > 0))
        ]
        number = 0
        for place, (step, again) in enumerate(evaluations):
            if plan.reset_at == step and not again:
                self.reset()
            for branch in range(len(plan.batch)):
                if not self._pass(plan, number, place, branch, levels, evaluations):
                    return
                number += 1
        if plan.ends:
            self.reset()

    def _pass(
        self,
        plan: Plan,
        number: int,
        place: int,
        branch: int,
        levels: list[float],
        evaluations: list[tuple[int, int]],
    ) -> bool:
        """One forward pass; False if it, or what follows it, was interrupted."""
        step, again = evaluations[place]
        expert = int(levels[step] < self.boundary)
        run = self.runs[expert]
        is_first = not self.seen[expert]
        total = len(evaluations) if plan.tells == "fields" else plan.steps if plan.known else None
        looks, last = (plan.grid, total, plan.tells == "fields"), self.last[expert]
        if is_first and self._is_ambiguous(plan, last, looks, levels[step]):
            run.end_generation()
            last = None
            event("reset by the user")
        # A step cache that was not reset after an interrupt may skip even the first pass.
        outlived = last is not None and last[0] == looks and not self.compiled
        layers = self._layers(plan, number, must_run=is_first and not outlived)

        run.context = None
        index = place if plan.tells == "fields" else step
        if plan.tells != "nothing":
            fields = {"step_index": place, "num_inference_steps": len(evaluations)}
            name = "cond_uncond" if plan.batch == (2,) else ("cond", "uncond")[branch]
            run.context = SimpleNamespace(name=name, **fields if plan.tells == "fields" else {})
        if not self.compiled:
            run.begin_forward(torch.tensor([levels[step]]))
        if layers or not self.compiled:
            self.seen[expert].append(levels[step])
        if plan.tells != "fields" and not plan.known:
            index = len(set(self.seen[expert])) - 1

        identity = (branch, 0 if plan.tells == "fields" else again)
        stopped = plan.stop is not None and plan.stop[0] == number
        for layer in layers:
            if stopped and layer >= plan.stop[1]:
                break
            self._attend(plan, expert, identity, layer, index, levels, step)
        entered = any(not stopped or layer < plan.stop[1] for layer in layers)
        mid = stopped and plan.stop[1] < LAYERS
        if entered:
            self.last[expert] = (looks, levels[step])
        if not self.compiled:
            if mid:
                # The next pass of this expert notices.
                self.last[expert] = None
            else:
                run.finish_forward()
        run.context = None
        return not stopped

    def _layers(self, plan: Plan, number: int, must_run: bool) -> list[int]:
        mask = plan.skip[number % len(plan.skip)] if plan.skip else 0
        layers = [layer for layer in range(LAYERS) if not mask >> layer & 1]
        if must_run and not layers:
            return list(range(LAYERS))
        if self.compiled and plan.tells == "nothing" and 0 not in layers:
            # A pass is then only seen to begin by its first layer.
            return [0, *layers]
        if self.compiled and plan.tells == "name" and plan.order == 2 and not layers:
            return [0]
        return layers

    def _is_ambiguous(self, plan: Plan, last: Any, looks: Any, level: float) -> bool:
        """Whether only a reset by the user can tell this from more of the generation before.

        Without any name, a restart at the very timestep of the last pass looks like another branch
        of it. Where the number of steps is unknown, a second expert may start below the timestep at
        which it was interrupted.
        """
        if last is None or last[0] != looks or plan.tells == "fields":
            return False
        return last[1] > level or (last[1] == level and plan.tells == "nothing")

    def _attend(
        self,
        plan: Plan,
        expert: int,
        identity: Any,
        layer: int,
        index: int,
        levels: list[float],
        step: int,
    ) -> None:
        run = self.runs[expert]
        batch, text = plan.batch[identity[0]], plan.text[identity[0]]
        entered = run.enter(
            layer,
            torch.tensor([levels[step]]),
            TokenLayout(plan.grid, text),
            tuple(levels) if plan.known else None,
            torch.empty(batch, 1, 1, 1),
        )
        memory = entered.memory.setdefault(layer, {})
        key = (expert, identity, layer)
        # Exactly the mask of this generation, expert, branch, layer and shape, or none.
        assert memory.get("mask") is self.masks.get(key)
        assert entered.step.index == index
        phase = self.schedule.phase(entered.step, memory.get("found")).value
        assert phase == self._expected_phase(index, self.found.get(key))
        if phase in ("search", "refresh"):
            memory["mask"] = self.masks[key] = object()
            memory["found"] = self.found[key] = index
        elif phase == "sparse":
            self.used += 1

    def _expected_phase(self, index: int, found: int | None) -> str:
        first, second = self.searches
        if index < first:
            return "dense"
        if found is None:
            return "search"
        return "refresh" if found < second <= index else "sparse"


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    history=histories(),
    first_search=st.integers(0, 1),
    compiled=st.booleans(),
    boundary=st.sampled_from([0.0, 400.0, 700.0]),
)
def test_every_call_finds_exactly_its_own_state(
    history: list[Plan], first_search: int, compiled: bool, boundary: float
) -> None:
    world = World(compiled, boundary, first_search)
    for plan in history:
        world.play(plan)
    world.reset()
    assert all(run.held_bytes() == 0 and not run.branches for run in world.runs)
    event("used a mask" if world.used else "used no mask")
