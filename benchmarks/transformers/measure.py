"""Timing forward passes of one transformer: dense, and in every phase of a sparse method."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks.transformers.backends import STOCK, dense_backend, other_backend
from benchmarks.transformers.models import Model
from benchmarks.transformers.phases import phase_of, representative, run_step
from dit_sparse import AdaSpa, Method, SparseConfig, SparseProcessor
from dit_sparse.methods.base import Stopwatch
from dit_sparse.methods.dense import Dense


@dataclass(frozen=True)
class Timing:
    """Medians over forward passes.

    Attributes:
        ms: On the device, gaps included.
        spread: Interquartile range over the median; 0 for fewer than three passes.
        host_ms: Until the call returned. Near ``ms`` or above, the host sets the pace, unless the
            model waits for the device inside.
        attention_ms: Self-attention with everything that sparse attention adds; None where nothing
            of this package was there to measure it.
        passes: How many.
    """

    ms: float
    spread: float
    host_ms: float
    attention_ms: float | None
    passes: int


@dataclass(frozen=True)
class Check:
    """One comparison of outputs, relative root mean square."""

    what: str
    error: float
    budget: float
    ok: bool


@dataclass(frozen=True)
class Sparse:
    """A method, measured.

    Attributes:
        timings: By phase.
        density: Achieved, mean over sparse calls.
        head_density: Lowest and highest of a head.
        peak_bytes: Most device memory in a generation.
        kept_bytes: Device memory held for layers between steps, all branches.
        notes: What the method says.
    """

    timings: dict[str, Timing]
    density: float
    head_density: tuple[float, float]
    peak_bytes: int
    kept_bytes: int
    notes: list[str]


class Bench:
    """One transformer on one device.

    Args:
        model: Which.
        layers: Layers of its longest stack, None for all.
        device: Where.
        dtype: Of weights and latents.
        steps: Denoising steps of a generation.
        repeats: Timed passes or generations, after one that is not.
    """

    def __init__(
        self,
        model: Model,
        layers: int | None,
        device: torch.device,
        dtype: torch.dtype,
        steps: int,
        repeats: int,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.steps, self.repeats = steps, repeats
        self.transformer: Any = model.build(layers, device, dtype)
        # Other latents in the second step of a comparison: with the same ones a method that keeps
        # what it missed is exact under any mask.
        self.arguments, self.others = (
            model.arguments(self.transformer, device, dtype, seed) for seed in (1, 2)
        )
        self.padding = "trim" if model.padded else "keep"
        # Real depth over the depth that is built.
        self.ratio = model.depth / sum(model.depths(layers).values())

    def forward(self, branch: str = "", step: int = 0, others: bool = False) -> Tensor:
        """One pass, of the first branch unless said, with the other latents if asked for."""
        branch = branch or self.model.branches[0]
        arguments = self.others if others else self.arguments
        return run_step(self.transformer, arguments, branch, step, self.steps)

    def rest(self) -> Timing:
        """Everything but the blocks."""
        with self.model.without_blocks(self.transformer):
            # It is short, and every other number rests on it.
            return self._repeat(self.forward, passes=5 + self.repeats)

    def dense(self, backend: str) -> tuple[Timing, int]:
        """Diffusers without us, and its peak memory in bytes."""
        with dense_backend(self.model, self.transformer, backend):
            self._reset_peak()
            timing = self._repeat(self.forward)
            return timing, self._peak()

    def attention(self, backend: str, padding: str = "keep") -> tuple[Timing, int]:
        """The same with self-attention timed, and with padding cut off if that is asked for."""
        config = SparseConfig(Dense(), dense_padding=padding)
        with (
            dense_backend(self.model, self.transformer, backend),
            SparseProcessor(config).install(self.transformer) as processor,
        ):
            self._reset_peak()
            # Passes of one step over and over would look like generations that never get on.
            steps = count()
            timing = self._repeat(lambda: self.forward(step=next(steps)), processor)
            return timing, self._peak()

    def sparse(self, config: SparseConfig, backend: str, phases: Sequence[str]) -> Sparse:
        """Every phase of a method.

        Raises:
            RuntimeError: If a step turns out to be of another phase than ``phases`` says.
        """
        samples: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        peak = kept = 0
        with (
            dense_backend(self.model, self.transformer, backend),
            SparseProcessor(config).install(self.transformer) as processor,
        ):
            for generation in range(1 + self.repeats):
                self._reset_peak()
                for step in representative(phases):
                    for branch in self.model.branches:
                        sample = self._timed(partial(self.forward, branch, step), processor)
                        found = phase_of(processor.bindings[0], branch)
                        if found != phases[step]:
                            raise RuntimeError(
                                f"expected step {step} to be {phases[step]}, it was {found}"
                            )
                        if generation > 0:
                            samples[found].append(sample)
                peak = self._peak()
                report = processor.report()
                # What is fetched from the host just now does not grow with depth and is left out.
                kept = processor.bindings[0].run.held_bytes(self.device.type)
                processor.reset()
        heads = [d for layer in report.layers for d in layer["head_density"] or ()]
        return Sparse(
            {phase: _timing(found) for phase, found in samples.items()},
            report.sparse_density,
            (min(heads, default=1.0), max(heads, default=1.0)),
            peak,
            kept,
            report.notes,
        )

    def check(self, exact: dict[str, SparseConfig], backend: str) -> list[Check]:
        """Whether methods at settings where they are exact give what dense attention gives.

        The budget is twice the distance between two dense kernels that share no code, so it is
        rounding in this dtype through these layers. That the comparison sees anything is checked
        with a mask that drops blocks: its distance has to be above the budget.
        """
        references = self._outputs(Dense(), backend)
        noise = _distance(self._outputs(Dense(), other_backend(self.device))[1], references[1])
        # Where both kernels round alike the unit of the last place is left.
        budget = 2 * max(noise, torch.finfo(self.dtype).eps / 8)
        rows = []

        def compare(what: str, out: Tensor, step: int) -> None:
            error = _distance(out, references[step])
            rows.append(Check(what, error, budget, error <= budget))

        if self.padding == "trim":
            with dense_backend(self.model, self.transformer, STOCK):
                compare("padding kept", self.forward(), 0)
        for label, config in exact.items():
            for step, out in enumerate(self._outputs(config.method, backend)):
                compare(f"{label}, exact, step {step}", out, step)
        dropped = _distance(self._outputs(AdaSpa(0.8, search=(0,)), backend)[1], references[1])
        rows.append(Check("dropped blocks show", dropped, budget, dropped > budget))
        return rows

    def _outputs(self, method: Method, backend: str) -> list[Tensor]:
        """Outputs of the first two steps, the second one with other latents."""
        config = SparseConfig(method, dense_padding=self.padding)
        with (
            dense_backend(self.model, self.transformer, backend),
            SparseProcessor(config).install(self.transformer) as processor,
        ):
            outputs = [self.forward(step=step, others=step > 0) for step in range(2)]
            found = phase_of(processor.bindings[0], self.model.branches[0])
            if not isinstance(method, Dense) and found == "dense":
                raise RuntimeError(f"{method} stayed dense, so nothing of it was checked")
        return outputs

    def _repeat(
        self,
        function: Callable[[], Tensor],
        processor: SparseProcessor | None = None,
        passes: int | None = None,
    ) -> Timing:
        samples = [self._timed(function, processor) for _ in range(1 + (passes or self.repeats))]
        return _timing(samples[1:])

    def _timed(
        self, function: Callable[[], Tensor], processor: SparseProcessor | None
    ) -> tuple[float, float, float]:
        """Milliseconds on the device, on the host, and in self-attention (NaN without us)."""
        run = processor.bindings[0].run if processor is not None else None
        if run is not None:
            run.attention_watch = Stopwatch()
        self._wait()
        watch = Stopwatch()
        began = time.perf_counter()
        stop = watch.start(self.device)
        function()
        stop()
        host = time.perf_counter() - began
        seconds = watch.seconds()
        attention = run.attention_watch.seconds() if run is not None else float("nan")
        return 1e3 * seconds, 1e3 * host, 1e3 * attention

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0


def _timing(samples: Sequence[tuple[float, float, float]]) -> Timing:
    device, host, attention = ([s[i] for s in samples] for i in range(3))
    spread = 0.0
    if len(device) > 2:
        low, middle, high = statistics.quantiles(device, n=4)
        spread = (high - low) / middle
    inside = None if attention[0] != attention[0] else statistics.median(attention)
    return Timing(statistics.median(device), spread, statistics.median(host), inside, len(samples))


def _distance(found: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; infinite if not finite."""
    found, reference = found.double(), reference.double()
    if not bool(found.isfinite().all() & reference.isfinite().all()):
        return float("inf")
    return float((found - reference).square().mean().sqrt() / reference.square().mean().sqrt())
