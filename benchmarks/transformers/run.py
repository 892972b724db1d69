"""All measurements of one transformer, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.transformers.backends import STOCK, compile_blocks, dense_backend, faster_backends
from benchmarks.transformers.categories import profile_step
from benchmarks.transformers.measure import Bench, Sparse, Timing
from benchmarks.transformers.phases import phase_of, representative, step_phases
from benchmarks.transformers.residuals import settled
from benchmarks.transformers.summary import (
    Floor,
    Scale,
    free_attention_limits,
    total,
    verdict,
)
from dit_sparse import SparseConfig, SparseProcessor
from dit_sparse.eval.arms import Arm

GB = 1e9
TRIMMED = "padding trimmed"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    layers: int | None
    steps: int
    repeats: int
    compiled: bool
    profiled: bool


class ModelRun:
    """Measures one transformer.

    Args:
        bench: It, ready to run.
        arms: The methods.
        options: What to measure.
        say: Told each result when it is known, in one line: a model takes minutes.
    """

    def __init__(
        self,
        bench: Bench,
        arms: Sequence[Arm],
        options: Options,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.bench, self.options, self.say = bench, options, say
        self.backends = faster_backends(bench.model, bench.device)
        self.configs: dict[str, SparseConfig] = {}
        self.notes: dict[str, str] = {}
        for arm in arms:
            method, note = settled(arm.config.method, bench)
            self.configs[arm.label] = replace(
                arm.config, method=method, dense_padding=bench.padding
            )
            if note is not None:
                self.notes[arm.label] = note
        # Phases follow the method as it was asked for; where residuals lie changes none.
        self.phases = {
            arm.label: step_phases(bench.model, arm.config, options.steps) for arm in arms
        }

    def checks(self) -> list[dict[str, Any]]:
        """Comparisons with dense attention, see :meth:`Bench.check`."""
        exact = {
            label: replace(config, method=type(config.method).exact())
            for label, config in self.configs.items()
        }
        return [asdict(check) for check in self.bench.check(exact, self.backends[0])]

    def results(self) -> dict[str, Any]:
        """Eager, then compiled, then a profile, as far as asked for."""
        found: dict[str, Any] = {"eager": self._mode({})}
        parts: dict[str, Callable[[], dict[str, Any]]] = {}
        if self.options.profiled:
            backend = found["eager"]["backend"]
            parts["profile"] = lambda: {
                label: self._profile(config, backend, self.phases[label])
                for label, config in self.configs.items()
            }
        if self.options.compiled:
            known = {row["arm"]: row["attention_ms"] for row in found["eager"]["dense"]}
            parts["compiled"] = lambda: self._compiled(known)
        for part, measured in parts.items():
            try:
                found[part] = measured()
            except RuntimeError as error:  # the eager results are worth keeping
                found.setdefault("errors", {})[part] = f"{type(error).__name__}: {error}"[:2000]
        return found

    def _compiled(self, attention: dict[str, float]) -> dict[str, Any]:
        compile_blocks(self.bench.model, self.bench.transformer)
        return self._mode(attention)

    def _mode(self, attention: dict[str, float]) -> dict[str, Any]:
        """All arms, eager or compiled as the blocks now are.

        Args:
            attention: Milliseconds of self-attention by arm where they are known already: the same
                kernels run in compiled blocks.
        """
        bench = self.bench
        scale = Scale(bench.rest().ms, bench.ratio)
        dense, errors = self._dense(scale, attention)
        stock = dense[0]
        fastest = min(
            (row for row in dense if row["arm"] != TRIMMED), key=lambda row: row["forward_ms"]
        )
        best = min(dense, key=lambda row: row["forward_ms"])
        # Dense steps of a method cut padding off, so the fastest backend without a mask is theirs.
        backend = dense[-1]["backend"] if bench.padding == "trim" else fastest["backend"]
        against = {"diffusers": stock, "fastest backend": fastest}
        against |= {TRIMMED: dense[-1]} if bench.padding == "trim" else {}
        sparse = []
        for label, config in self.configs.items():
            torch.compiler.reset()
            measured = bench.sparse(config, backend, self.phases[label])
            row = self._sparse_row(label, measured, scale, against, best)
            sparse.append(row)
            phases = (f"{name} {x['forward_ms']:.0f} ms" for name, x in row["phases"].items())
            self.say(f"{label}: {', '.join(phases)} a pass, {row['total_s']:.1f} s")
        return {
            "rest_ms": scale.rest_ms,
            "ratio": scale.ratio,
            "backend": backend,
            "dense": dense,
            "unusable_backends": errors,
            "fastest": fastest["arm"],
            "sparse": sparse,
        }

    def _dense(
        self, scale: Scale, attention: dict[str, float]
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Rows of the dense arms, diffusers as it comes first, trimmed padding last; and errors."""
        bench, rows, errors = self.bench, [], {}
        for backend in (STOCK, *self.backends):
            arm = "diffusers" if backend == STOCK else f"diffusers, {backend}"
            try:
                torch.compiler.reset()
                timing, peak = bench.dense(backend)
                inside = attention.get(arm)
                if inside is None:
                    inside = bench.attention(backend)[0].attention_ms
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if backend == STOCK:
                    raise
                # A backend that takes no mask, or cannot be compiled.
                errors[backend] = f"{type(error).__name__}: {error}"[:300]
                continue
            rows.append(self._dense_row(arm, backend, timing, inside, peak, scale))
            self.say(f"{arm}: {rows[-1]['forward_ms']:.0f} ms a pass, {rows[-1]['total_s']:.1f} s")
        if bench.padding == "trim":
            torch.compiler.reset()
            backend = self.backends[0]
            timing, peak = bench.attention(backend, "trim")
            rows.append(self._dense_row(TRIMMED, backend, timing, timing.attention_ms, peak, scale))
        return rows, errors

    def _dense_row(
        self,
        arm: str,
        backend: str,
        timing: Timing,
        attention_ms: float | None,
        peak: int,
        scale: Scale,
    ) -> dict[str, Any]:
        assert attention_ms is not None
        forward = scale.forward(timing.ms)
        all_attention = attention_ms * scale.ratio
        sums = total({"dense": self.options.steps}, {"dense": forward}, self._passes)
        return {
            "arm": arm,
            "backend": backend,
            "measured": asdict(timing),
            "attention_ms": attention_ms,
            "forward_ms": forward,
            "forward": scale.line(timing.ms),
            "attention_share": all_attention / forward,
            "total_s": sums.seconds,
            "total": sums.line,
            "peak_gb": peak / GB,
            "peak_full_gb": self._full_peak(peak, 0),
        }

    def _sparse_row(
        self,
        label: str,
        found: Sparse,
        scale: Scale,
        against: dict[str, dict[str, Any]],
        best: dict[str, Any],
    ) -> dict[str, Any]:
        model, counts = self.bench.model, Counter(self.phases[label])
        forward = {phase: scale.forward(t.ms) for phase, t in found.timings.items()}
        sums = total(counts, forward, self._passes)
        speedup = {name: row["total_s"] / sums.seconds for name, row in against.items()}
        floor = Floor(best["forward_ms"], best["forward_ms"] * best["attention_share"])
        last = found.timings.get("sparse") or list(found.timings.values())[-1]
        assert last.attention_ms is not None
        goals = [("fastest backend", model.goal), ("diffusers", model.goal_stock)]
        everywhere, in_sparse = free_attention_limits(counts, floor.forward_ms, floor.attention_ms)
        return {
            "method": label,
            "config": self.configs[label].to_dict(),
            "phases": {
                phase: {
                    "steps": counts[phase],
                    "measured": asdict(timing),
                    "forward_ms": forward[phase],
                    "forward": scale.line(timing.ms),
                    "attention_ms": (timing.attention_ms or 0.0) * scale.ratio,
                }
                for phase, timing in found.timings.items()
            },
            "density": found.density,
            "head_density": found.head_density,
            "total_s": sums.seconds,
            "total": sums.line,
            "speedup": speedup,
            "limit_free_attention": everywhere,
            "limit_free_sparse_steps": in_sparse,
            "verdicts": {
                name: verdict(
                    goal,
                    speedup[name],
                    against[name]["forward_ms"],
                    counts,
                    forward,
                    last.attention_ms * scale.ratio,
                    found.density,
                    floor,
                )
                for name, goal in goals
                if goal is not None
            },
            "peak_gb": found.peak_bytes / GB,
            "kept_gb": found.kept_bytes / GB,
            "peak_full_gb": self._full_peak(found.peak_bytes, found.kept_bytes),
            "notes": [*found.notes, *filter(None, [self.notes.get(label)])],
        }

    @property
    def _passes(self) -> int:
        return len(self.bench.model.branches)

    def _full_peak(self, peak: int, kept: int) -> float:
        """GB with all layers: weights and what is kept between steps grow, activations do not."""
        bench = self.bench
        weights = bench.model.block_bytes(bench.transformer)
        return (peak + (weights + kept) * (bench.ratio - 1)) / GB

    def _profile(
        self, config: SparseConfig, backend: str, phases: Sequence[str]
    ) -> dict[str, Any] | None:
        """One sparse step, profiled; None if there is none."""
        bench = self.bench
        chosen = representative(phases)
        sparse = [step for step in chosen if phases[step] == "sparse"]
        if len(sparse) < 2:
            return None
        with (
            dense_backend(bench.model, bench.transformer, backend),
            SparseProcessor(config).install(bench.transformer) as processor,
        ):
            for step in chosen[: chosen.index(sparse[1])]:
                bench.forward(step=step)
            profile = profile_step(lambda: bench.forward(step=sparse[1]), bench.device)
            found = phase_of(processor.bindings[0], bench.model.branches[0])
            if found != "sparse":
                raise RuntimeError(f"expected a sparse step to profile, it was {found}")
        return {
            **asdict(profile),
            "total_ms": profile.total_ms,
            "verdicts": profile.verdicts(),
        }
