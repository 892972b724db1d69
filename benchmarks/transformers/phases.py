"""What a method does in each step of a generation, and which steps are enough to time it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from benchmarks.transformers.models import Model
from dit_sparse import SparseConfig, SparseProcessor
from dit_sparse.processors.binding import Binding

# Steps timed of each stretch of equal steps, and of each kind in all.
PER_STRETCH = 2
PER_PHASE = 4


def run_step(model: Any, arguments: dict[str, Any], branch: str, step: int, steps: int) -> Tensor:
    """One forward pass as a pipeline makes it in ``step``."""
    with torch.no_grad(), model.cache_context(branch, step_index=step, num_inference_steps=steps):
        return model(**arguments, return_dict=False)[0]


def phase_of(binding: Binding, branch: str) -> str:
    """What the layers did in the last pass of ``branch``; several phases joined by ``+``."""
    log = binding.run.log.items()
    return "+".join(sorted({entry.last_phase for (name, _), entry in log if name == branch}))


def step_phases(model: Model, config: SparseConfig, steps: int) -> list[str]:
    """The phase of every step of a generation, seen on the tiny variant of ``model``."""
    small, device = model.shrunk(), torch.device("cpu")
    transformer: Any = small.build(None, device, torch.float32)
    arguments = small.arguments(transformer, device, torch.float32)
    # A kernel that the configuration names may not run here, and changes no phase.
    processor = SparseProcessor(replace(config, impl="auto")).install(transformer)
    branch, found = small.branches[0], []
    for step in range(steps):
        run_step(transformer, arguments, branch, step, steps)
        found.append(phase_of(processor.bindings[0], branch))
    return found


def representative(phases: Sequence[str]) -> list[int]:
    """Steps whose time stands for all: the first ones of every stretch of equal phases.

    Phases depend on the index of a step and on what earlier ones left, so the steps between may be
    left out; a dense one is timed once.
    """
    chosen: list[int] = []
    taken, start = Counter[str](), 0
    for phase, stretch in groupby(phases):
        length = len(list(stretch))
        most = min(length, 1 if phase == "dense" else PER_STRETCH, PER_PHASE - taken[phase])
        chosen += range(start, start + most)
        taken[phase] += most
        start += length
    return chosen
