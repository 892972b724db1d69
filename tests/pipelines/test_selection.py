"""The rule that chooses a pattern for each head, and the search for its price."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from dit_sparse.pipelines.selection import (
    choose,
    fit_epsilon,
    fit_price,
    mean_cost,
    mean_loss,
)

COSTS = torch.tensor([1.0, 0.0, 0.3, 0.35, 0.25], dtype=torch.float64)


@pytest.fixture
def losses() -> torch.Tensor:
    """``[steps, layers, heads, modes]``; skip loses most."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.rand(3, 4, 5, 5, generator=rng, dtype=torch.float64).square()
    drawn[..., 0] = 0
    drawn[..., 1] = 0.5 + drawn[..., 1]
    return drawn


def test_epsilon_decides_whether_a_head_may_be_sparse(losses: torch.Tensor) -> None:
    assert (choose(losses, COSTS, 0.5, -math.inf) == 0).all()
    assert (choose(losses, COSTS, 0.5, math.inf) > 0).all()
    sums = losses[..., 1:] + 0.5 * COSTS[1:]
    assert (choose(losses, COSTS, 0.5, 0.4) == 0).equal((sums > 0.4).all(-1))


def test_lambda_weighs_cost_against_loss(losses: torch.Tensor) -> None:
    free = choose(losses, COSTS, 0.0, math.inf)
    assert free.equal(losses[..., 1:].argmin(-1) + 1)
    assert (choose(losses, COSTS, 1e6, math.inf) == 1).all()
    assert (choose(losses, COSTS, 1e6) == 1).all()


def test_dense_competes_with_its_own_cost_by_default(losses: torch.Tensor) -> None:
    sums = losses + 0.2 * COSTS
    assert choose(losses, COSTS, 0.2).equal(sums.argmin(-1))


def test_equal_losses_give_the_first_mode() -> None:
    losses = torch.full((2, 5), 0.1)
    assert choose(losses, torch.full((5,), 0.2), 1.0, 10.0).tolist() == [1, 1]
    # A sum that equals epsilon does not exceed it.
    assert choose(torch.tensor([0.0, 0.25]), torch.tensor([1.0, 0.25]), 1.0, 0.5).item() == 1


def test_infinite_losses_stay_dense_whatever_epsilon() -> None:
    losses = torch.tensor([0.0, math.inf, math.inf])
    assert choose(losses, torch.tensor([1.0, 0.0, 0.5]), 1e6, math.inf).item() == 0


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_fitted_price_meets_the_target_and_no_lower_one_does(
    losses: torch.Tensor, target: float
) -> None:
    price = fit_price(losses, COSTS, target)
    assert mean_cost(choose(losses, COSTS, price), COSTS) <= target
    if price > 0:
        assert mean_cost(choose(losses, COSTS, price * (1 - 1e-6)), COSTS) > target


def test_a_larger_budget_never_loses_more(losses: torch.Tensor) -> None:
    targets = [0.05, 0.1, 0.2, 0.3, 0.5, 0.8]
    found = [choose(losses, COSTS, fit_price(losses, COSTS, t)) for t in targets]
    lost = [mean_loss(choice, losses) for choice in found]
    assert lost == sorted(lost, reverse=True)


def test_the_fitted_price_is_the_optimum_of_its_cost() -> None:
    rng = torch.Generator().manual_seed(1)
    losses = torch.rand(4, 3, generator=rng, dtype=torch.float64)
    losses[:, 0] = 0
    costs = torch.tensor([1.0, 0.2, 0.5], dtype=torch.float64)
    for target in (0.3, 0.5, 0.7):
        choice = choose(losses, costs, fit_price(losses, costs, target))
        spent, lost = mean_cost(choice, costs), mean_loss(choice, losses)
        for other in product(range(3), repeat=4):
            other_choice = torch.tensor(other)
            if mean_cost(other_choice, costs) <= spent:
                assert mean_loss(other_choice, losses) >= lost - 1e-12


@pytest.mark.parametrize("target", [0.35, 0.5, 0.9])
def test_epsilon_is_fitted_where_lambda_is_given(losses: torch.Tensor, target: float) -> None:
    epsilon = fit_epsilon(losses, COSTS, target, 0.5)
    assert mean_cost(choose(losses, COSTS, 0.5, epsilon), COSTS) <= target
    assert mean_cost(choose(losses, COSTS, 0.5, epsilon * (1 - 1e-6)), COSTS) > target


def test_a_target_out_of_reach_is_refused_with_the_least_possible(losses: torch.Tensor) -> None:
    losses[0, :, :, 1:] = math.inf  # a third of the steps must stay dense
    with pytest.raises(ValueError, match=r"at least 0\.3333"):
        fit_price(losses, COSTS, 0.2)
    assert mean_cost(choose(losses, COSTS, fit_price(losses, COSTS, 0.4)), COSTS) <= 0.4
