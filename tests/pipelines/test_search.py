"""The offline search on a toy model whose best plan is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call, ModelIdentity
from dit_sparse.methods.plan import DENSE, Mode
from dit_sparse.pipelines import calibration, search
from dit_sparse.pipelines.calibration import head_losses, measured_costs, nominal_costs
from dit_sparse.pipelines.search import SearchSettings, candidate_modes
from dit_sparse.pipelines.search_state import SearchState
from dit_sparse.schedule import Step

# Four blocks of 64 in either order: a frame is one block, and so are sixteen places.
LAYOUT = TokenLayout((4, 8, 8))
MODES = (
    DENSE,
    Mode("skip"),
    Mode("diagonal", 0.1),
    Mode("multi_diagonal", 0.1),
    Mode("vertical_stripe", 0.25, 0.0),
    Mode("vertical_stripe", 0.25, 0.5),
)
# What each head of a layer attends to, as indices of MODES; 0 attends to everything.
PLANTED = ((2, 3, 4, 1), (0, 5, 2, 3))
STEPS, LAYERS, HEADS = 3, len(PLANTED), len(PLANTED[0])


def weights(mode: int) -> Tensor:
    """Queries and keys ``[2, tokens, 16]`` whose softmax is (nearly) uniform over one pattern."""
    tokens = torch.arange(LAYOUT.tokens)
    queries, keys = torch.zeros(2, LAYOUT.tokens, 16, dtype=torch.float64)
    if mode in (2, 3):
        block = tokens // 64 if mode == 2 else tokens % 64 // 16
        queries[tokens, block] = keys[tokens, block] = 1.0
    elif mode in (4, 5):
        columns = MODES[mode].pattern(4).column_blocks(4)
        queries[:, 0] = 1.0
        keys[torch.isin(tokens // 64, torch.tensor(columns)), 0] = 1.0
    return torch.stack([queries, keys]) * 20


class Toy:
    """Layers ``x + attention``, whose attention pattern is fixed and whose values come from x."""

    def __init__(self) -> None:
        self.identity = ModelIdentity("Toy", (("num_layers", "2"),), "transformer")
        self.attend: Callable[[Call], Tensor] = lambda call: call.dense()
        self.inputs: list[Tensor] = []
        rng = torch.Generator().manual_seed(0)
        shape = (1, LAYOUT.tokens, HEADS, 16)
        self.noise = torch.randn(shape, generator=rng, dtype=torch.float64)

    def forward(self, x: Tensor, index: int, branch: str) -> Tensor:
        for layer, planted in enumerate(PLANTED):
            self.inputs.append(x)
            q, k = (torch.stack([weights(m)[i] for m in planted], 1)[None] for i in (0, 1))
            v = x.clone()
            v[:, :, [head for head, mode in enumerate(planted) if mode == 1]] = 0
            call = Call(
                q, k, v, LAYOUT, Step(index, STEPS, index / STEPS, branch, 0), layer, LAYERS,
                None, {}, 1.0, "auto", lambda _, q=q, k=k, v=v: (_softmax(q, k, v), None),
                model=self.identity,
            )  # fmt: skip
            x = x + 0.5 * self.attend(call)
        return x

    def generate(self, caption: str, after_step: Callable[[], None]) -> None:
        x = self.noise * (1 + len(caption))
        for index in range(STEPS):
            x = x - 0.1 * sum(self.forward(x, index, branch) for branch in ("cond", "uncond"))
            after_step()


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    model = Toy()

    @contextmanager
    def enable(pipe: Any, name: str) -> Any:
        assert (pipe, name) == ("pipe", "dense")
        yield SimpleNamespace(bindings=[model])

    monkeypatch.setattr(search, "enable_sparse_attention", enable)
    return model


def run(
    toy: Toy,
    settings: SearchSettings,
    captions: tuple[str, ...] = ("a", "bcd"),
    state: SearchState | None = None,
    on_progress: Any = None,
) -> search.SearchResult:
    state = SearchState(None, {}) if state is None else state
    return search.search("pipe", toy.generate, captions, settings, state, {"seed": 7}, on_progress)


def settings(**values: Any) -> SearchSettings:
    values = {"price": 1e-3, "cost": "nominal", **values}
    return SearchSettings(MODES, **values)


@pytest.mark.parametrize("strategy", ["greedy", "stored"])
def test_planted_patterns_are_found(toy: Toy, strategy: str) -> None:
    found = run(toy, settings(strategy=strategy))
    assert [step.table for step in found.plan.steps] == [PLANTED] * STEPS
    assert [step.progress for step in found.plan.steps] == [0.0, 0.333333, 0.666667]
    assert found.mean_loss < 1e-6
    # One of four blocks in each row; dense and skip.
    planted = torch.tensor(PLANTED)
    cost = torch.tensor([1.0, 0.0, 0.25, 0.25, 0.25, 0.25])[planted].mean()
    assert found.mean_cost == pytest.approx(float(cost))


def test_a_target_cost_is_met_and_the_cheapest_loss_given_up_first(toy: Toy) -> None:
    free = run(toy, settings()).mean_cost
    found = run(toy, settings(price=None, target_cost=free - 0.05))
    assert found.mean_cost <= free - 0.05
    assert found.price > 1e-3
    assert found.plan.provenance["search"]["target_cost"] == free - 0.05
    assert run(toy, settings(price=None, target_cost=1.0)).mean_loss < 1e-6


def test_epsilon_keeps_heads_dense(toy: Toy) -> None:
    found = run(toy, settings(price=0.0, epsilon=-1.0))
    assert {mode for step in found.plan.steps for row in step.table for mode in row} == {0}
    found = run(toy, settings(price=0.0, epsilon=float("inf")))
    assert 0 not in {mode for step in found.plan.steps for row in step.table for mode in row}


def test_greedy_feeds_errors_on_and_stored_stays_on_the_dense_trajectory(toy: Toy) -> None:
    toy.generate("a", lambda: None)
    dense, toy.inputs = toy.inputs, []
    run(toy, settings(strategy="stored", price=1e3), ("a",))
    assert all(torch.equal(x, y) for x, y in zip(toy.inputs, dense, strict=True))
    toy.inputs = []
    run(toy, settings(strategy="greedy", price=1e3), ("a",))
    same = [torch.equal(x, y) for x, y in zip(toy.inputs, dense, strict=True)]
    # The first layer of the first step, in both branches, has seen no error yet.
    assert [i for i, equal in enumerate(same) if equal] == [0, LAYERS]


def test_losses_are_averaged_over_captions_and_branches(toy: Toy) -> None:
    state = SearchState(None, {})
    found = run(toy, settings(strategy="stored"), state=state)
    names = {f"stored/{c}/transformer/{b}/0" for c in (0, 1) for b in ("cond", "uncond")}
    mean = torch.stack([state.losses[name] for name in names]).mean(0)
    chosen = torch.tensor(found.plan.steps[0].table)
    torch.testing.assert_close(
        calibration.choose(mean.double(), torch.tensor(found.costs), 1e-3), chosen
    )
    assert len(state.losses) == 2 * 2 * STEPS


def test_the_first_steps_stay_dense_and_count_in_the_cost(toy: Toy) -> None:
    found = run(toy, settings(price=None, target_cost=0.6, warmup=1))
    tables = [{m for row in step.table for m in row} for step in found.plan.steps]
    assert tables[0] == {0} and {0} not in tables[1:]
    assert 1 / 3 < found.mean_cost <= 0.6
    with pytest.raises(ValueError, match=r"at least 0\.3333"):
        run(toy, settings(price=None, target_cost=0.3, warmup=1))


@pytest.mark.parametrize("values", [{"strategy": "stored"}, {"price": None, "target_cost": 0.25}])
@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_search_goes_on_to_the_same_plan(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict, stop: int
) -> None:
    measured: list[int] = []
    original = calibration.Calibrator._measure
    monkeypatch.setattr(
        calibration.Calibrator,
        "_measure",
        lambda *args: measured.append(1) or original(*args),  # type: ignore[func-returns-value]
    )
    whole = run(toy, settings(**values))
    needed = len(measured)
    measured.clear()

    path = tmp_path / "search.state"

    def interrupt(phase: str, number: int, done: int) -> None:
        if number * STEPS + done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(toy, settings(**values), state=SearchState(path, {"seed": 0}), on_progress=interrupt)
    before = len(measured)
    assert before == stop * LAYERS * 2
    again = run(toy, settings(**values), state=SearchState(path, {"seed": 0}))
    assert len(measured) == needed  # nothing twice
    assert again.plan.steps == whole.plan.steps
    assert (again.price, again.mean_loss) == (whole.price, whole.mean_loss)
    # A finished search needs no generation at all, and another budget none either if stored.
    monkeypatch.setattr(toy, "generate", None)
    assert run(toy, settings(**values), state=SearchState(path, {"seed": 0})).plan.steps == (
        whole.plan.steps
    )
    other = settings(strategy="stored", price=None, target_cost=0.1)
    assert run(toy, other, state=SearchState(path, {"seed": 0})).mean_cost <= 0.1


def test_a_state_with_other_costs_is_refused(toy: Toy) -> None:
    state = SearchState(None, {})
    run(toy, settings(), state=state)
    with pytest.raises(ValueError, match="holds nominal costs, not measured"):
        run(toy, settings(cost="measured"), state=state)


def test_the_state_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.state"
    state = SearchState(path, {"seed": 0, "steps": 4})
    state.put("stored/0/transformer/cond/0", 1, 3, torch.rand(4, 6))
    state.save()
    again = SearchState(path, {"seed": 0, "steps": 4})
    assert again.get("stored/0/transformer/cond/0", 1).equal(
        state.get("stored/0/transformer/cond/0", 1)
    )
    assert again.get("stored/0/transformer/cond/0", 0) is None
    with pytest.raises(ValueError, match="differs in seed"):
        SearchState(path, {"seed": 1, "steps": 4})
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="unreadable"):
        SearchState(path, {})


def test_the_loss_of_skip_is_the_heads_share_of_the_layers_output() -> None:
    rng = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 30, 3, 8, generator=rng) * torch.tensor([0.1, 1.0, 2.0])[:, None]
    energy = reference.square().mean((0, 1, 3))
    torch.testing.assert_close(
        head_losses(torch.zeros_like(reference), reference), energy / energy.mean()
    )
    assert head_losses(reference, reference).equal(torch.zeros(3))
    assert head_losses(torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)).equal(torch.zeros(2))
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 20:] = False
    padded = reference.clone()
    padded[1, 20:] = float("nan")
    part = torch.cat([reference[0], reference[1, :20]])[None]
    torch.testing.assert_close(
        head_losses(torch.zeros_like(padded), padded, valid),
        head_losses(torch.zeros_like(part), part),
    )


def test_costs(toy: Toy) -> None:
    calls: list[Call] = []
    toy.attend = lambda call: calls.append(call) or call.dense()  # type: ignore[func-returns-value]
    toy.forward(toy.noise, 0, "cond")
    assert nominal_costs(calls[0], MODES, 64) == [1.0, 0.0, 0.25, 0.25, 0.25, 0.25]
    costs = measured_costs(calls[0], MODES, 64)
    assert costs[0] == 1.0 and len(costs) == len(MODES)
    # The toy's dense attention is the slowest way there is; skipping is the fastest.
    assert all(0 < cost < 1 for cost in costs[1:]) and min(costs) == costs[1]


def test_measured_costs_decide_between_equal_losses(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Column 0 twice, once said to be slow.
    twins = (DENSE, Mode("vertical_stripe", 0.25), Mode("vertical_stripe", 0.25, 0.01))
    assert twins[1].pattern(4).column_blocks(4) == twins[2].pattern(4).column_blocks(4)
    for costs, winner in (([1.0, 0.5, 0.2], 2), ([1.0, 0.2, 0.5], 1)):
        monkeypatch.setitem(calibration.COSTS, "measured", lambda *_, c=costs: c)
        found = run(toy, SearchSettings(twins, price=1e-3, cost="measured"), ("a",))
        assert found.plan.steps[0].table[0][2] == winner
        assert found.costs == costs


def test_each_expert_gets_the_steps_that_it_runs(toy: Toy) -> None:
    def generate(caption: str, after_step: Callable[[], None]) -> None:
        for index in range(STEPS):
            expert = "transformer" if index < 1 else "transformer_2"
            toy.identity = dataclasses.replace(toy.identity, component=expert)
            toy.forward(toy.noise, index, "cond")
            after_step()

    toy.generate = generate  # type: ignore[method-assign]
    plan = run(toy, settings(), ("a",)).plan
    assert [s.component for s in plan.steps] == ["transformer", "transformer_2", "transformer_2"]
    assert plan.step_at(0.1, "transformer_2") is plan.steps[1]


def test_provenance_tells_how_the_plan_came_about(toy: Toy) -> None:
    found = run(toy, settings())
    assert found.plan.provenance["seed"] == 7
    told = found.plan.provenance["search"]
    assert told["captions"] == ["a", "bcd"]
    assert told["costs"]["diagonal 0.1"] == 0.25
    assert (told["lambda"], told["epsilon"]) == (1e-3, 1e-3)
    assert (told["mean_cost"], told["mean_loss"]) == (found.mean_cost, found.mean_loss)
    assert found.plan.model == dataclasses.replace(toy.identity, component="")
    assert (found.plan.grid, found.plan.heads, found.plan.dim) == ((4, 8, 8), HEADS, 16)


def test_candidates() -> None:
    modes = candidate_modes(densities=(0.25,), shifts=2)
    assert [str(mode) for mode in modes] == [
        "dense",
        "skip",
        "diagonal 0.25",
        "multi_diagonal 0.25",
        "vertical_stripe 0.25",
        "vertical_stripe 0.25 shift 0.5",
    ]
    assert candidate_modes(("diagonal",), (0.5, 0.25, 0.5)) == (
        DENSE,
        Mode("diagonal", 0.5),
        Mode("diagonal", 0.25),
    )
    with pytest.raises(ValueError, match="mode must be one of"):
        candidate_modes(("window",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "random"}, "strategy must be one of"),
        ({"cost": "flops"}, "cost must be one of"),
        ({"block": 32}, "block must be 64 or 128"),
        ({"modes": (DENSE,)}, "nothing to choose"),
        ({"price": None}, "a lambda or a target cost"),
        ({"price": -1.0}, "lambda must be at least 0"),
        ({"price": None, "target_cost": 1.5}, r"target cost must be in \[0, 1\]"),
        ({"price": None, "epsilon": 1.0, "target_cost": 0.5}, "epsilon goes with a lambda"),
        ({"epsilon": 1.0, "target_cost": 0.5}, "epsilon goes with a lambda"),
    ],
)
def test_settings_that_determine_no_search_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSettings(**{"modes": MODES, "price": 0.1, **values})
