"""Costs beside a reference, and shares of work that match them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dit_sparse.pipelines.latency import match_cost, relative_cost


def test_costs_are_relative_to_the_reference() -> None:
    calls: list[str] = []

    def work(name: str, amount: int) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            sum(range(amount))

        return run

    cpu = torch.device("cpu")
    ratio, unit = relative_cost(
        work("run", 1_200_000), work("reference", 400_000), cpu, (3, 20), 0.2
    )
    assert 2 < ratio < 4.5
    assert 0 < unit < 1
    turns = len(calls) // 2
    assert calls == ["run", "reference"] * turns
    assert 1 + 3 <= turns <= 1 + 20
    # At least three however long they take, no more than twenty however short.
    for amount, seconds, expected in ((10_000, 0.0, 3), (1, 60.0, 20)):
        calls.clear()
        relative_cost(
            work("run", amount), work("reference", amount + 10_000), cpu, (3, 20), seconds
        )
        assert len(calls) == 2 * (1 + expected)


@pytest.mark.parametrize("start", [0.1, 0.3, 0.9])
@pytest.mark.parametrize(("fixed", "slope"), [(0.0, 2.5), (0.3, 2.0), (0.5, 4.0)])
def test_linear_costs_are_matched(start: float, fixed: float, slope: float) -> None:
    found = match_cost(lambda share: fixed + slope * share, start)
    assert found is not None
    assert found[0] == pytest.approx((1 - fixed) / slope, rel=0.1)
    assert found[1] == pytest.approx(1, abs=0.05)


def test_costs_in_steps_are_matched_from_below() -> None:
    steps: list[float] = []

    def cost(share: float) -> float:
        steps.append(share)
        return 0.7 if share < 0.25 else 1.3

    found = match_cost(cost, 0.2)
    assert found is not None
    assert found[0] < 0.25 and found[1] == 0.7
    assert len(steps) <= 4


def test_what_costs_more_at_any_share_is_not_matched() -> None:
    assert match_cost(lambda share: 1.2 + share, 0.2) is None


def test_everything_is_taken_where_it_is_cheap() -> None:
    assert match_cost(lambda share: 0.1 + 0.2 * share, 0.2) == (1.0, pytest.approx(0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_time_is_no_cost_on_cuda() -> None:
    cuda = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=cuda, dtype=torch.bfloat16)
    small = torch.zeros(1, device=cuda)

    def many_small_kernels() -> None:
        for _ in range(200):
            small.add_(1)

    # Launched one by one they take the host longer than the product takes the device.
    ratio, unit = relative_cost(many_small_kernels, lambda: matrix @ matrix, cuda, seconds=0.2)
    assert 0.5e-3 < unit < 20e-3
    assert ratio < 0.5
