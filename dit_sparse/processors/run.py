"""The state of a bound model: where its generation stands and what was kept for it.

This is the only mutable state of the package. It belongs to one bound model and is keyed by CFG
branch and layer; it is emptied with every new generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call, Stopwatch
from dit_sparse.schedule import Phase, Step


@dataclass(slots=True)
class LayerLog:
    """What one layer did in one branch over a generation."""

    phases: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    last_phase: str = ""
    # Per head, summed over calls; stays on the device until a report is asked for.
    sparse_density: Tensor | None = None


@dataclass(slots=True)
class Branch:
    """One CFG branch of the current generation."""

    step: Step
    timestep: float | None
    step_index: int | None
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)


class Run:
    """Follows the generations of one bound model from inside its attention calls.

    Nothing is counted by calls: caches skip layers and whole steps. A forward pass begins where the
    layer index does not increase. Within it the step comes from the pipeline's cache context where
    that is filled, else from the timestep: lower is the next step, equal another branch of the same
    step, higher a new generation.
    """

    def __init__(self) -> None:
        self.generation = -1
        self.branches: dict[str, Branch] = {}
        self.log: dict[tuple[str, int], LayerLog] = {}
        self.attention_watch = Stopwatch()
        self.search_watch = Stopwatch()
        self.layout: TokenLayout | None = None
        # The pipeline's cache context: set and cleared around each transformer call.
        self.context: Any = None
        self.dense_steps: set[int] = set()
        self.sparse_steps: set[int] = set()
        self.cache_bytes = 0
        self._current: Branch | None = None
        self._last_layer = -1
        self._forward_context: Any = None
        self._first_timestep = 0.0
        self._signature: tuple[Any, ...] | None = None
        self._ended = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        # A copied model starts its own generations; masks of the original are not its own.
        return Run()

    def end_generation(self) -> None:
        """Drops everything kept between steps. The log stays until the next generation begins."""
        self.cache_bytes = max(self.cache_bytes, self.held_bytes())
        self.branches = {}
        self._current = None
        self._last_layer = -1
        self._signature = None
        self._ended = True

    def enter(
        self,
        layer: int,
        timestep: Tensor | None,
        layout: TokenLayout,
        total: int | None,
        shape: Any,
    ) -> Branch:
        """The branch that the attention call of ``layer`` belongs to."""
        # A context object belongs to one forward pass, so a new one is a new pass even where a step
        # cache skipped the layers in between.
        if (
            self._current is None
            or layer <= self._last_layer
            or self.context is not self._forward_context
        ):
            self._current = self._begin_forward(timestep, layout, total, shape)
            self._forward_context = self.context
        self._last_layer = layer
        return self._current

    def _begin_forward(
        self, timestep: Tensor | None, layout: TokenLayout, total: int | None, shape: Any
    ) -> Branch:
        context = self.context
        name = getattr(context, "name", None) or "call"
        index = getattr(context, "step_index", None)
        total = getattr(context, "num_inference_steps", None) or total
        # Reading the timestep waits for the device, so only where no context tells the step. Wan
        # 2.2 gives one timestep a token, 0 for the clean first frame: the largest is the step's.
        value = None
        if index is None:
            if timestep is None:
                raise RuntimeError(
                    "neither a cache context nor a timestep tells the denoising step; call the "
                    "transformer through its own forward with a timestep"
                )
            value = float(timestep.max())
        signature = (layout, total, shape)
        if self._ended or signature != self._signature or self._is_restart(name, index, value):
            self._new_generation(layout, signature)
        if value is not None and not self.branches:
            self._first_timestep = value
        return self._advance(name, index, value, total)

    def _is_restart(self, name: str, index: int | None, value: float | None) -> bool:
        if index is not None:
            branch = self.branches.get(name)
            if branch is None or branch.step_index is None:
                # Another branch may be ahead: then this one belongs to a new generation.
                known = [b.step_index for b in self.branches.values() if b.step_index is not None]
                return bool(known) and index < max(known)
            return index <= branch.step_index
        seen = [b.timestep for b in self.branches.values() if b.timestep is not None]
        return bool(seen) and value is not None and value > min(seen)

    def _new_generation(self, layout: TokenLayout, signature: tuple[Any, ...]) -> None:
        self.end_generation()
        self.generation += 1
        self.layout = layout
        self.log = {}
        self.attention_watch, self.search_watch = Stopwatch(), Stopwatch()
        self.dense_steps, self.sparse_steps = set(), set()
        self.cache_bytes = 0
        self._signature = signature
        self._ended = False

    def _advance(
        self, name: str, index: int | None, value: float | None, total: int | None
    ) -> Branch:
        key = name
        if index is None:
            # Calls of one name at one timestep are branches: the first "call", then "call#1", ...
            repeat = 0
            while key in self.branches and self.branches[key].timestep == value:
                repeat += 1
                key = f"{name}#{repeat}"
        branch = self.branches.get(key)
        if value is not None:
            # A branch that was skipped for some steps is as far as the one that was not.
            others = {b.step.index for b in self.branches.values() if b.timestep == value}
            latest = max((b.step.index for b in self.branches.values()), default=-1)
            position = max(others) if others else latest + 1
            progress = 1 - value / self._first_timestep if self._first_timestep > 0 else 0.0
        else:
            position = index or 0
            progress = position / total if total else 0.0
        step = Step(position, total, progress, key, self.generation)
        if branch is None:
            branch = self.branches[key] = Branch(step, value, index)
        else:
            branch.step, branch.timestep, branch.step_index = step, value, index
        return branch

    def note(self, call: Call) -> None:
        """Adds a finished call to the log."""
        entry = self.log.setdefault((call.step.branch, call.layer), LayerLog())
        entry.phases[call.phase.value] += 1
        entry.last_phase = call.phase.value
        entry.kernels[call.kernel] += 1
        self.search_watch.marks += call.search_watch.marks
        if call.phase in (Phase.DENSE, Phase.SEARCH):
            self.dense_steps.add(call.step.index)
            return
        self.sparse_steps.add(call.step.index)
        if call.head_density is not None:
            density = call.head_density.mean(0)
            previous = entry.sparse_density
            entry.sparse_density = density if previous is None else previous + density

    def held_bytes(self) -> int:
        """Bytes of masks and statistics that are kept now."""
        seen: dict[int, int] = {}
        for branch in self.branches.values():
            for tensor in _tensors(branch.memory):
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(seen.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))
