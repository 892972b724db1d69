"""The state of a bound model: where its generation stands and what was kept for it.

This is the only mutable state of the package. It belongs to one bound model and is keyed by CFG
branch and layer; it is emptied with every new generation.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call, Stopwatch
from dit_sparse.processors.moment import UNNAMED, Moment
from dit_sparse.processors.ulysses import Heads
from dit_sparse.schedule import Phase, Step

# Calls of one name at one timestep that are taken for branches of one step. More of them, as in a
# benchmark loop, would hold a mask each.
MAX_REPEATS = 16
_clock = itertools.count()


@dataclass(slots=True)
class LayerLog:
    """What one layer did in one branch over a generation."""

    phases: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    last_phase: str = ""
    search_watch: Stopwatch = field(default_factory=Stopwatch)
    cache_bytes: int = 0
    # Densities [batch | 1, heads | 1] of masks and how many sparse calls in a row had them. They
    # stay on the device, and nothing is computed, until a report is asked for.
    densities: list[tuple[Tensor, int]] = field(default_factory=list)
    heads: int = 0
    # Heads of each device, where there are several.
    owners: Heads = ()

    @property
    def sparse_calls(self) -> int:
        return sum(calls for _, calls in self.densities)

    @property
    def sparse_density(self) -> Tensor | None:
        """Density of every head, ``[heads]``, mean over the sparse calls; None without one."""
        if not self.densities:
            return None
        # A mask may be one for all heads.
        summed = [calls * each.mean(0).expand(self.heads) for each, calls in self.densities]
        return torch.stack(summed).sum(0) / self.sparse_calls

    def add_sparse_call(self, density: Tensor, heads: int) -> None:
        """Notes one more call under a mask of ``density``, which must not change any more."""
        self.heads = heads
        if self.densities and self.densities[-1][0] is density:
            self.densities[-1] = (density, self.densities[-1][1] + 1)
        else:
            self.densities.append((density, 1))


@dataclass(slots=True)
class Branch:
    """One CFG branch of the current generation."""

    step: Step
    moment: Moment
    # Text tokens before the video and in all, and batch size, once known. These may differ between
    # branches; masks of one do not fit another.
    shape: tuple[int, int, int] | None
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)


class Run:
    """Follows the generations of one bound model from inside its attention calls.

    Nothing is counted by calls: caches skip layers and whole steps. A forward pass begins where the
    model's pre-hook says so; where the whole model is compiled that is not seen, and it begins
    where the layer index does not increase or the cache context is another. The step comes from the
    pipeline's cache context where that is filled, else from the timestep: lower is the next step,
    equal another branch of the same step, higher a new generation.
    """

    def __init__(self) -> None:
        self.generation = -1
        self.branches: dict[str, Branch] = {}
        # What a method keeps for all branches and layers together.
        self.shared: dict[str, Any] = {}
        self.log: dict[tuple[str, int], LayerLog] = {}
        # Lines for the report, by topic; like the log they outlive their generation.
        self.notes: dict[str, str] = {}
        self.attention_watch = Stopwatch()
        # The pipeline's cache context: set and cleared around each transformer call.
        self.context: Any = None
        self.dense_steps: set[int] = set()
        self.sparse_steps: set[int] = set()
        self.cache_bytes = 0
        # Generations of one step in a row, each ended by the next: a sign that steps are not seen.
        self.lone_steps = 0
        # When the generation began and ended, on a clock that all runs share.
        self.began = self.ended = -1
        self._is_inside_forward = False
        # Forward passes since the last attention call: context and timestep, not yet read.
        self._passes: list[tuple[Any, Tensor | None]] = []
        self._current: Branch | None = None
        self._last_layer = -1
        self._forward_context: Any = None
        self._first_value = 0.0
        self._signature: tuple[Any, ...] | None = None
        self._has_searched = False
        self._names = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        # A copied model starts its own generations; masks of the original are not its own.
        return Run()

    @property
    def is_idle(self) -> bool:
        """Whether no generation is under way: none has begun, or the last one has ended."""
        return self._signature is None

    @property
    def stayed_dense(self) -> int:
        """Steps of this generation if it has come to its last one and none was sparse, else 0."""
        steps = [branch.step for branch in self.branches.values()]
        is_last = any(step.total is not None and step.index >= step.total - 1 for step in steps)
        return len(self.dense_steps) if is_last and not self.sparse_steps else 0

    def begin_forward(self, timestep: Tensor | None) -> None:
        """Notes that a forward pass of the model begins, with its timestep argument."""
        if self._is_inside_forward:
            # The last one was interrupted, so whatever comes now is another generation.
            self.end_generation()
        self._is_inside_forward = True
        self._current = None
        self._passes.append((self.context, timestep))

    def finish_forward(self) -> None:
        """Notes that the forward pass has come to its end."""
        self._is_inside_forward = False
        if self.is_idle:
            self._passes = []

    def end_generation(self) -> None:
        """Drops everything kept between steps. The log stays until the next generation begins."""
        self.measure_memory()
        self.branches = {}
        self.shared = {}
        if not self.is_idle:
            self.ended = next(_clock)
        self._passes = []
        self._current = None
        self._last_layer = -1
        self._signature = None

    def is_new_pass(self, layer: int) -> bool:
        """Whether an attention call of ``layer`` now is the first one of a forward pass."""
        # A context object belongs to one forward pass, so a new one is a new pass even where a step
        # cache skipped the layers in between.
        return (
            self._current is None
            or layer <= self._last_layer
            or self.context is not self._forward_context
        )

    def enter(
        self,
        layer: int,
        timestep: Tensor | None,
        layout: TokenLayout,
        timesteps: tuple[float, ...] | None,
        q: Tensor,
    ) -> Branch:
        """The branch that the attention call of ``layer`` belongs to.

        Args:
            layer: Index of the layer.
            timestep: The model's timestep argument.
            layout: The tokens of this forward pass.
            timesteps: The distinct timesteps of this generation, where the pipeline is known.
            q: The layer's queries ``[batch, tokens, heads, dim]``.
        """
        if self._current is None or self.is_new_pass(layer):
            self._current = self._begin_pass(timestep, layout, timesteps, q)
            self._forward_context = self.context
        self._last_layer = layer
        return self._current

    def _begin_pass(
        self,
        timestep: Tensor | None,
        layout: TokenLayout,
        timesteps: tuple[float, ...] | None,
        q: Tensor,
    ) -> Branch:
        # Methods may let go of what they kept before the generation ends.
        if self._has_grown():
            self.measure_memory()
        fixed = (layout.grid, q.dtype, q.device)
        now = Moment.read(self.context, timestep, timesteps)
        # Passes in which a step cache skipped every layer count as well.
        skipped, self._passes = self._passes[:-1], []
        for earlier, moment in skipped:
            then = Moment.read(earlier, moment, timesteps)
            if self._is_restart(then):
                # The cache outlived the generation before.
                self._new_generation((fixed, then.kind))
            self._advance(then, None)
        if (fixed, now.kind) != self._signature or self._is_restart(now):
            self._new_generation((fixed, now.kind))
        return self._advance(now, (layout.text_before, layout.text, q.shape[0]))

    def _is_restart(self, now: Moment) -> bool:
        branch = self.branches.get(now.name or UNNAMED)
        if now.index is not None:
            if branch is None or branch.moment.index is None:
                # Another branch may be ahead: then this one belongs to a new generation.
                known = [b.moment.index for b in self.branches.values()]
                return any(index is not None and now.index < index for index in known)
            return now.index <= branch.moment.index
        seen = [b.moment.value for b in self.branches.values() if b.moment.value is not None]
        if not seen or now.value is None:
            return False
        # No scheduler repeats its first timestep, so the same name there again is a restart after
        # an interrupt in the first step. Without names it may as well be the other CFG branch.
        again = now.name is not None and branch is not None and now.value == self._first_value
        return now.value > min(seen) or again or seen.count(now.value) >= MAX_REPEATS

    def _new_generation(self, signature: tuple[Any, ...]) -> None:
        is_lone = not self.is_idle and len(self.dense_steps | self.sparse_steps) == 1
        self.lone_steps = self.lone_steps + 1 if is_lone else 0
        self.end_generation()
        self.generation += 1
        self.began = next(_clock)
        self.log = {}
        self.notes = {}
        self.attention_watch = Stopwatch()
        self.dense_steps, self.sparse_steps = set(), set()
        self.cache_bytes = 0
        self._signature = signature

    def _advance(self, now: Moment, shape: tuple[int, int, int] | None) -> Branch:
        if now.value is not None and not self.branches:
            self._first_value = now.value
        key = name = now.name or UNNAMED
        if now.index is None:
            # Calls of one name at one timestep are branches: the first "call", then "call#1", ...
            repeat = 0
            while key in self.branches and self.branches[key].moment.value == now.value:
                repeat += 1
                key = f"{name}#{repeat}"
        position = now.position
        if position is None:
            # A branch that was skipped for some steps is as far as the one that was not.
            others = {b.step.index for b in self.branches.values() if b.moment.value == now.value}
            latest = max((b.step.index for b in self.branches.values()), default=-1)
            position = max(others) if others else latest + 1
        if now.noise is not None:
            progress = 1 - now.noise
        elif now.value is not None:
            progress = 1 - now.value / self._first_value if self._first_value > 0 else 0.0
        else:
            progress = position / now.total if now.total else 0.0
        step = Step(position, now.total, progress, key, self.generation)
        branch = self.branches.get(key)
        if branch is None or (shape is not None and branch.shape not in (None, shape)):
            branch = self.branches[key] = Branch(step, now, shape)
        else:
            branch.step, branch.moment, branch.shape = step, now, shape or branch.shape
        return branch

    def note(self, call: Call, density: Tensor | None = None, owners: Heads = ()) -> None:
        """Adds a finished call to the log.

        Args:
            call: The call.
            density: Density of the layer's heads ``[batch | 1, heads]``, where there are several
                devices, each with some of them.
            owners: Which device has which.
        """
        key = (call.step.branch, call.layer)
        entry = self.log.get(key)
        if entry is None:
            entry = self.log[key] = LayerLog()
        phase = entry.last_phase = call.phase.value
        entry.phases[phase] += 1
        entry.kernels[call.kernel] += 1
        if call.search_watch.marks:
            entry.search_watch.marks += call.search_watch.marks
        if call.phase is not Phase.SPARSE:
            self._has_searched = True
        if call.phase in (Phase.DENSE, Phase.SEARCH):
            self.dense_steps.add(call.step.index)
            return
        self.sparse_steps.add(call.step.index)
        if call.head_density is not None:
            entry.owners = owners
            if density is None:
                entry.add_sparse_call(call.head_density, call.q.shape[2])
            else:
                entry.add_sparse_call(density, density.shape[-1])

    def _has_grown(self) -> bool:
        """Whether more may be held than when this was asked last: looking takes a while.

        Methods add to what they keep where they search, or under a new name.
        """
        names = len(self.shared)
        for branch in self.branches.values():
            names += sum(map(len, branch.memory.values()))
        grown = self._has_searched or names != self._names
        self._has_searched, self._names = False, names
        return grown

    def measure_memory(self) -> None:
        """Notes what is held between two passes, in all and by layer, where it is the most yet."""
        held = _storages(self.shared)
        for name, branch in self.branches.items():
            for layer, memory in branch.memory.items():
                own = _storages(memory)
                held.update(own)
                if (name, layer) in self.log:
                    entry = self.log[name, layer]
                    entry.cache_bytes = max(entry.cache_bytes, sum(own.values()))
        self.cache_bytes = max(self.cache_bytes, sum(held.values()))

    def held_bytes(self, kind: str | None = None) -> int:
        """Bytes of masks and statistics that are kept now; ``kind`` as for :func:`stored_bytes`."""
        kept = [self.shared, *(branch.memory for branch in self.branches.values())]
        return stored_bytes(kept, kind)


def stored_bytes(value: Any, kind: str | None = None) -> int:
    """Bytes that the tensors in ``value`` keep allocated; shared storage counts once.

    Args:
        value: Tensors in containers and dataclasses.
        kind: Type of device, e.g. ``"cuda"``, to count those tensors only; None for all.
    """
    return sum(_storages(value, kind).values())


def _storages(value: Any, kind: str | None = None) -> dict[int, int]:
    """Bytes of each storage that the tensors in ``value`` share, by its address."""
    found: dict[int, int] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            if kind is None or item.device.type == kind:
                storage = item.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        else:
            names = _field_names(type(item))  # type: ignore[arg-type]  # classes are hashable
            waiting += [getattr(item, name) for name in names]
    return found


@lru_cache(maxsize=256)
def _field_names(kind: type) -> tuple[str, ...]:
    """Fields of a dataclass; none of anything else."""
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else ()
