"""What sparse attention did in a generation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from dit_sparse.kernels.ops import why_chosen
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
        layers: One entry per layer and branch, by model, branch and layer. Its keys:

            * ``layer``: index of the self-attention layer in execution order;
            * ``name``: its module;
            * ``model``: number of the bound model, 1 for the second expert;
            * ``branch``: CFG branch;
            * ``phases``: calls by phase, e.g. ``{"dense": 9, "search": 1, "sparse": 40}``;
            * ``last_phase``: that of the last call;
            * ``kernels``: calls by the implementation that computed them;
            * ``head_density``: achieved density of each head, a list, mean over its sparse calls;
              None if there was none;
            * ``search_seconds``: time in its searches;
            * ``cache_bytes``: most memory held for it between steps.

        choices: Why calls went to each of ``kernels`` in this process, e.g. ``"attention as
            measured on h100-sm90"``, ``"attention by its rank"`` or ``"attention as named"``.
        notes: What the methods say beside the numbers, e.g. the memory that a residual takes.
        imbalance: Where the heads of a layer are on several devices: what the busiest one computes
            over their mean, over all sparse calls; 1.0 is even, and one device. Densities are
            those of all devices; times, calls by kernel and memory are this device's.
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
    choices: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    imbalance: float = 1.0

    def __str__(self) -> str:
        line = (
            f"density {self.density:.3f} ({self.sparse_density:.3f} on sparse calls), "
            f"{self.dense_steps} dense and {self.sparse_steps} sparse steps, attention "
            f"{self.attention_seconds:.3f} s (search {self.search_seconds:.3f} s), "
            f"{self.cache_bytes / 2**20:.1f} MiB kept, calls by "
            f"{_counts(self.kernels) or 'nothing yet'}"
        )
        if self.imbalance > 1:
            line += f", busiest device {self.imbalance:.2f} times the mean"
        return "\n".join([line, *self.notes])

    def table(self, width: int = 120) -> str:
        """The summary, and the layers as a table with a row per layer and branch; print it.

        Args:
            width: Columns to fill at most.
        """
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for name in ("layer", "branch", "calls", "kernels", "density", "density of heads, %"):
            table.add_column(name, overflow="fold")
        for name in ("search ms", "KiB"):
            table.add_column(name, justify="right")
        models = len({entry["model"] for entry in self.layers})
        for entry in self.layers:
            heads = entry["head_density"]
            prefix = f"{entry['model']}: " if models > 1 else ""
            table.add_row(
                prefix + entry["name"],
                entry["branch"],
                _counts(entry["phases"]),
                _counts(entry["kernels"]),
                "-" if heads is None else f"{sum(heads) / len(heads):.3f}",
                "-" if heads is None else " ".join(f"{100 * head:.0f}" for head in heads),
                f"{1e3 * entry['search_seconds']:.2f}",
                f"{entry['cache_bytes'] / 1024:.1f}",
            )
        console = Console(file=StringIO(), width=width, force_terminal=False)
        console.print(str(self), highlight=False)
        console.print(table)
        for name, why in self.choices.items():
            console.print(f"{name}: {why}", highlight=False)
        return console.file.getvalue()  # type: ignore[attr-defined]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


def make_report(bindings: Sequence[Binding]) -> Report:
    """Reads the logs of ``bindings``; waits for the device."""
    # An expert that the last generation did not reach still holds the log of the one before.
    latest = max((binding.run.began for binding in bindings), default=-1)
    runs = [b.run for b in bindings if b.run.ended < b.run.began or b.run.ended > latest]
    layers: list[dict[str, Any]] = []
    kernels: Counter[str] = Counter()
    calls = sparse_calls = 0
    kept = busiest = mean = 0.0
    for number, binding in enumerate(bindings):
        if binding.run not in runs:
            continue
        binding.run.measure_memory()
        for (branch, layer), entry in sorted(binding.run.log.items()):
            density = None
            if entry.sparse_density is not None:
                density = entry.sparse_density.tolist()
                loads = [sum(density[head] for head in own) for own in entry.owners] or [1.0]
                busiest += max(loads) * entry.sparse_calls
                mean += sum(loads) / len(loads) * entry.sparse_calls
                kept += sum(density) / len(density) * entry.sparse_calls
            calls += entry.phases.total()
            sparse_calls += entry.sparse_calls
            kernels.update(entry.kernels)
            layers.append(
                {
                    "layer": layer,
                    "name": binding.sites[layer].name,
                    "model": number,
                    "branch": branch,
                    "phases": dict(entry.phases),
                    "last_phase": entry.last_phase,
                    "kernels": dict(entry.kernels),
                    "head_density": density,
                    "search_seconds": entry.search_watch.seconds(),
                    "cache_bytes": entry.cache_bytes,
                }
            )
    return Report(
        density=(calls - sparse_calls + kept) / calls if calls else 1.0,
        sparse_density=kept / sparse_calls if sparse_calls else 1.0,
        dense_steps=sum(len(run.dense_steps - run.sparse_steps) for run in runs),
        sparse_steps=sum(len(run.sparse_steps) for run in runs),
        attention_seconds=sum(run.attention_watch.seconds() for run in runs),
        search_seconds=sum(entry["search_seconds"] for entry in layers),
        cache_bytes=sum(run.cache_bytes for run in runs),
        kernels=dict(kernels),
        layers=layers,
        choices={
            part: why_chosen(part)
            for part in dict.fromkeys(part for name in kernels for part in name.split("+"))
            if why_chosen(part)
        },
        imbalance=busiest / mean if mean else 1.0,
        notes=list(dict.fromkeys(line for run in runs for line in run.notes.values())),
    )
