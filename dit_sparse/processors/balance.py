"""Which device computes which head, where heads cost differently much.

A step of Ulysses takes as long as its busiest device. What heads cost is known after a generation;
within one they stay where they are, because their masks do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.processors.ulysses import Heads, even_parts

# Below this gain the heads keep the model's order, which saves a copy of queries, keys and values.
WORTH = 0.02


def in_order(heads: int, size: int) -> Heads:
    """Heads dealt out in the model's order, as evenly as they can be.

    Raises:
        ValueError: If a device would get none.
    """
    if heads < size:
        raise ValueError(
            f"expected a head or more for each device, got {heads} heads for {size} devices; use "
            f"an ulysses_degree of {heads} or less"
        )
    parts = even_parts(heads, size)
    return tuple(tuple(range(sum(parts[:i]), sum(parts[: i + 1]))) for i in range(size))


def by_cost(cost: Sequence[float], size: int) -> Heads:
    """Heads dealt out so that the busiest device has little more to do than the others.

    Each device gets as many heads as in the model's order; the dearest heads go first, each to the
    device that has least to do so far (longest processing time first, Graham 1969).

    Args:
        cost: Of every head, relative to each other.
        size: Number of devices.
    """
    plain = in_order(len(cost), size)
    dealt: list[list[int]] = [[] for _ in plain]
    for head in sorted(range(len(cost)), key=lambda head: (-cost[head], head)):
        free = [rank for rank in range(size) if len(dealt[rank]) < len(plain[rank])]
        least = min(free, key=lambda rank: (sum(cost[h] for h in dealt[rank]), rank))
        dealt[least].append(head)
    balanced = tuple(tuple(sorted(heads)) for heads in dealt)
    gain = busiest(cost, plain) - busiest(cost, balanced)
    return balanced if gain > WORTH * busiest(cost, plain) else plain


def busiest(cost: Sequence[float], heads: Heads) -> float:
    """What the busiest device has to do."""
    return max(sum(cost[head] for head in own) for own in heads)


class HeadBalance:
    """Deals the heads of every layer out anew in each generation, by the densities of the last.

    Every device must note the same densities, and all of them, so that all deal alike.
    """

    def __init__(self) -> None:
        self._generation = -1
        self._density: dict[int, Tensor] = {}
        self._heads: dict[int, Heads] = {}

    def heads(self, layer: int, count: int, size: int, generation: int) -> Heads:
        """Which device has which of the ``count`` heads of ``layer`` in this generation."""
        if generation != self._generation:
            self._generation = generation
            self._heads = {}
            if self._density:
                # Read back from the device once a generation.
                costs = torch.stack(list(self._density.values())).tolist()
                dealt = (by_cost(cost, size) for cost in costs)
                self._heads = dict(zip(self._density, dealt, strict=True))
            self._density = {}
        return self._heads.setdefault(layer, in_order(count, size))

    def note(self, layer: int, density: Tensor) -> None:
        """Adds the density of all heads in one call of ``layer``, ``[heads]``."""
        before = self._density.get(layer)
        self._density[layer] = density if before is None else before + density
