"""What sparse attention did in a generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_sparse.processors.binding import Binding


@dataclass(frozen=True)
class Report:
    """The last generation, over all bound models.

    Attributes:
        density: Mean achieved density over all self-attention calls; dense ones count 1.
        sparse_density: The same over sparse calls only; 1.0 if there was none.
        dense_steps: Denoising steps in which attention was dense (warm-up and first search).
        sparse_steps: Denoising steps in which it was sparse.
        attention_seconds: Time in self-attention, searches included, measured on the device.
        search_seconds: The searches' part of it.
        cache_bytes: Most memory held between steps for masks and statistics.
        kernels: Calls by the implementation that computed them; ``"own"`` is the model's.
        layers: One entry per layer and branch: ``layer, name, branch, phases, last_phase, kernels,
            head_density`` (mean over its sparse calls, a list over heads, or None).
    """

    density: float
    sparse_density: float
    dense_steps: int
    sparse_steps: int
    attention_seconds: float
    search_seconds: float
    cache_bytes: int
    kernels: dict[str, int]
    layers: list[dict[str, Any]]

    def __str__(self) -> str:
        kernels = ", ".join(f"{name} x{count}" for name, count in sorted(self.kernels.items()))
        return (
            f"density {self.density:.3f} ({self.sparse_density:.3f} on sparse calls), "
            f"{self.dense_steps} dense and {self.sparse_steps} sparse steps, attention "
            f"{self.attention_seconds:.3f} s (search {self.search_seconds:.3f} s), "
            f"{self.cache_bytes / 2**20:.1f} MiB kept, calls by {kernels or 'nothing yet'}"
        )


def make_report(bindings: Sequence[Binding]) -> Report:
    """Reads the logs of ``bindings``; waits for the device."""
    layers: list[dict[str, Any]] = []
    kernels: Counter[str] = Counter()
    calls = sparse_calls = 0
    kept = 0.0
    for binding in bindings:
        for (branch, layer), entry in sorted(binding.run.log.items()):
            sparse = entry.phases["sparse"] + entry.phases["refresh"]
            density = None
            if entry.sparse_density is not None and sparse:
                density = (entry.sparse_density / sparse).tolist()
                kept += sum(density) / len(density) * sparse
            calls += entry.phases.total()
            sparse_calls += sparse
            kernels.update(entry.kernels)
            layers.append(
                {
                    "layer": layer,
                    "name": binding.sites[layer].name,
                    "branch": branch,
                    "phases": dict(entry.phases),
                    "last_phase": entry.last_phase,
                    "kernels": dict(entry.kernels),
                    "head_density": density,
                }
            )
    return Report(
        density=(calls - sparse_calls + kept) / calls if calls else 1.0,
        sparse_density=kept / sparse_calls if sparse_calls else 1.0,
        dense_steps=sum(len(b.run.dense_steps - b.run.sparse_steps) for b in bindings),
        sparse_steps=sum(len(b.run.sparse_steps) for b in bindings),
        attention_seconds=sum(b.run.attention_watch.seconds() for b in bindings),
        search_seconds=sum(b.run.search_watch.seconds() for b in bindings),
        cache_bytes=sum(max(b.run.cache_bytes, b.run.held_bytes()) for b in bindings),
        kernels=dict(kernels),
        layers=layers,
    )
