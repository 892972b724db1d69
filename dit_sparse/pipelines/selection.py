"""From the losses of every pattern of every head to the choice of one: Sparse-vDiT's rule.

The rule (arXiv 2506.03065, algorithm 1) adds to the loss of a sparse pattern a price times its
cost and takes the cheapest sum, unless all sums exceed a threshold epsilon: then the head is dense.
With epsilon = price x cost of dense, dense simply competes with its loss of 0, and the rule is the
optimum of total loss under a budget of total cost: the Lagrangian of that problem. That is the
default here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def choose(losses: Tensor, costs: Tensor, price: float, epsilon: float | None = None) -> Tensor:
    """The mode of every head.

    Args:
        losses: Loss of every mode, ``[..., modes]``; mode 0 is dense and its loss is not read.
        costs: Cost of every mode, ``[modes]``; dense costs ``costs[0]``.
        price: The paper's lambda, at least 0.
        epsilon: Sums above it make a head dense; ``price * costs[0]`` if None.

    Returns:
        ``[...]`` int64 indices of modes; of equal sums the first.
    """
    threshold = price * float(costs[0]) if epsilon is None else epsilon
    sums = losses[..., 1:] + price * costs[1:].to(losses)
    least = sums.amin(-1, keepdim=True)
    # argmin may return any of several equal ones.
    numbers = torch.arange(1, losses.shape[-1], device=losses.device)
    first = torch.where(sums == least, numbers, losses.shape[-1]).amin(-1)
    # Infinite losses mark what may not be chosen, whatever the threshold.
    is_sparse = (least[..., 0] <= threshold) & least[..., 0].isfinite()
    return first.where(is_sparse, 0)


def mean_cost(choice: Tensor, costs: Tensor) -> float:
    """Mean cost of the chosen modes over all heads, layers and steps."""
    return float(costs[choice].mean())


def mean_loss(choice: Tensor, losses: Tensor) -> float:
    """Mean loss of the chosen modes; that of dense is 0."""
    picked = losses.gather(-1, choice.unsqueeze(-1))[..., 0]
    return float(picked.masked_fill(choice == 0, 0.0).mean())


def fit_price(losses: Tensor, costs: Tensor, target: float) -> float:
    """The lowest price at which the mean cost is at most ``target``, dense competing.

    Raises:
        ValueError: If no price reaches the target.
    """
    return _lowest(lambda price: mean_cost(choose(losses, costs, price), costs), target)


def fit_epsilon(losses: Tensor, costs: Tensor, target: float, price: float) -> float:
    """The lowest threshold at which the mean cost is at most ``target``, at a given price.

    Raises:
        ValueError: If no threshold reaches the target.
    """
    return _lowest(lambda epsilon: mean_cost(choose(losses, costs, price, epsilon), costs), target)


def _lowest(cost_at: Callable[[float], float], target: float) -> float:
    """Bisects the smallest value >= 0 at which a falling cost is at most ``target``."""
    if cost_at(0.0) <= target:
        return 0.0
    high = 1e-6
    while cost_at(high) > target:
        high *= 2
        if high > 1e12:
            raise ValueError(
                f"expected a target cost of at least {cost_at(high):.4f}, the least that these "
                f"modes, their costs, the warm-up and a given lambda allow, got {target}"
            )
    low = 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if cost_at(middle) <= target:
            high = middle
        else:
            low = middle
    return high
