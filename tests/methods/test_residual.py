"""Residuals: their arithmetic, the memory they take, and their way to host memory and back."""

from __future__ import annotations

import ast
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import residual as residual_kernels
from dit_sparse.methods import residual as residual_module
from dit_sparse.methods import transfer as transfer_module
from dit_sparse.methods.base import Call
from dit_sparse.methods.residual import ResidualStore
from dit_sparse.methods.residual_plan import (
    IN_FLIGHT,
    PRECISIONS,
    BranchShape,
    ResidualOptions,
    ResidualPlan,
    device_budget,
)
from dit_sparse.methods.residual_values import HostResidual, Residual
from dit_sparse.methods.transfer import Copy, HostArena, PlainTransfer, transfer_for
from dit_sparse.processors.run import Run
from dit_sparse.schedule import Step

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_residual_completes_what_it_was_taken_from(
    with_factor: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse = (random(2, 50, 3, 8, seed=seed).to(dtype) for seed in (0, 1))
    factor = random(2, 50, 3, 1, seed=2).sigmoid().float() if with_factor else None
    whole = Residual.between(dense, sparse, factor)
    assert whole.values.dtype == dtype
    assert whole.scale is None
    expected = dense.double() - (1 if factor is None else factor.double()) * sparse.double()
    assert (whole.values - expected).abs().max() <= 4 * torch.finfo(dtype).eps
    out = whole.add_to(sparse.clone(), factor)
    assert out.dtype == dtype
    # One rounding when the residual is kept and one of the result.
    tolerance = 4e-7 if dtype is torch.float64 else 8 * torch.finfo(dtype).eps
    if factor is None or dtype is not torch.float64:
        assert (out - dense).abs().max() <= tolerance
    else:
        assert (out - dense).abs().max() <= 1e-14
    # The result does not depend on how many tokens are computed at a time.
    monkeypatch.setattr(residual_kernels, "_CHUNK_ELEMENTS", 7 * 2 * 3 * 8)
    assert torch.equal(Residual.between(dense, sparse, factor).values, whole.values)
    assert torch.equal(whole.add_to(sparse.clone(), factor), out)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4])
def test_float8_rounds_within_its_bound(magnitude: float) -> None:
    rows = magnitude * random(2, 40, 3, 64, dtype=torch.float32)
    # Rows of different size, one with a single large element, one of zeros.
    rows *= torch.logspace(-3, 3, 40)[:, None, None]
    rows[0, 5, 1, 7] = 1e3 * rows[0, 5, 1].abs().max()
    rows[0, 6, 1] = 0
    kept = Residual.between(rows, torch.zeros_like(rows), precision="float8")
    assert kept.values.dtype == torch.float8_e4m3fn
    assert kept.scale is not None
    assert kept.scale.shape == (2, 40, 3, 1)
    back = kept.add_to(torch.zeros_like(rows))
    largest = rows.abs().amax(-1, keepdim=True)
    bound = torch.maximum(rows.abs() / 16, largest / 448 / 1024)
    error = (back - rows).abs()
    assert (error <= bound * 1.001 + 1e-37).all()
    assert (back[0, 6, 1] == 0).all()
    # The bound is not slack, and the rows' own scales are what makes it hold.
    assert (error / bound.clamp_min(1e-37)).max() > 0.9
    assert kept.values.float().abs().amax(-1).ne(448).sum() == 1


def test_precisions_are_what_they_say() -> None:
    dense, sparse = (
        random(1, 9, 2, 16, dtype=torch.float32),
        random(1, 9, 2, 16, seed=1, dtype=torch.float32),
    )
    exact = dense - sparse
    errors = {}
    for precision in PRECISIONS:
        kept = Residual.between(dense, sparse, precision=precision)
        errors[precision] = float((kept.add_to(sparse.clone()) - dense).abs().max())
    assert errors["native"] <= 1e-6 < 1e-4 < errors["bfloat16"] <= float(exact.abs().max()) / 256
    assert errors["bfloat16"] < errors["float8"] <= float(exact.abs().max()) / 16


@pytest.mark.parametrize("with_bias", [False, True])
def test_keeping_it_before_or_after_the_projection_is_the_same(with_bias: bool) -> None:
    dense, sparse, later = (random(2, 30, 3, 8, seed=seed) for seed in range(3))
    rho = random(2, 30, 3, 1, seed=3).sigmoid()
    project = torch.nn.Linear(24, 24, bias=with_bias).double()
    if with_bias:
        torch.nn.init.constant_(project.bias, 5.0)
    with torch.no_grad():
        # As the paper's code keeps it: the difference of two projected outputs.
        after = project(dense.flatten(2)) - project((rho * sparse).flatten(2))
        reference = project((rho * later).flatten(2)) + after
        kept = Residual.between(dense, sparse, rho)
        ours = project(kept.add_to(later.clone(), rho).flatten(2))
        assert (ours - reference).abs().max() < 1e-12
        assert (kept.values.flatten(2) @ project.weight.T - after).abs().max() < 1e-12
        assert after.numel() == kept.values.numel()


# --- memory ----------------------------------------------------------------------------------

# Gigabytes of fp16 residuals and of fp32 row statistics: tokens, layers, heads, dim, CFG branches.
TABLE = {
    "CogVideoX-2B": (17_776, 30, 30, 64, 2, 4.1, 0.13),
    "CogVideoX1.5-5B": (45_106, 42, 48, 64, 2, 23, 0.73),
    "HunyuanVideo": (119_056, 60, 24, 128, 1, 44, 0.69),
    "Wan2.1-14B": (75_600, 40, 40, 128, 2, 62, 0.97),
    "Wan2.1-1.3B": (32_760, 30, 12, 128, 2, 6.0, 0.09),
}


def plan_of(model: str, budget: float | None = None, host: float = 1e12, **options: Any) -> Any:
    tokens, layers, heads, dim, branches, _, _ = TABLE[model]
    shape = BranchShape(1, tokens, heads, dim, torch.float16)
    names = tuple((f"branch{n}", shape) for n in range(branches))
    limit = None if budget is None else int(budget * 1e9)
    return ResidualPlan(
        ResidualOptions(**options), layers, (), names, CPU, limit, int(host), row_statistics=1
    )


@pytest.mark.parametrize("model", TABLE)
def test_the_plan_knows_what_real_models_take(model: str) -> None:
    *_, residual, statistics = TABLE[model]
    plan = plan_of(model)
    assert plan.residual_bytes / 1e9 == pytest.approx(residual, rel=0.03)
    assert plan.statistics_bytes / 1e9 == pytest.approx(statistics, rel=0.06)
    assert plan.device_bytes == plan.residual_bytes + plan.statistics_bytes
    assert plan.host_bytes == 0
    dim = TABLE[model][3]
    small = plan_of(model, precision="float8")
    assert small.residual_bytes / plan.residual_bytes == pytest.approx((dim + 4) / (2 * dim))
    away = plan_of(model, offload=True)
    assert away.host_bytes == plan.residual_bytes
    one = plan.residual_bytes // (TABLE[model][1] * TABLE[model][4])
    assert away.device_bytes == IN_FLIGHT * one + plan.statistics_bytes
    assert plan_of(model, layers=10).device_bytes == plan.device_bytes * 10 // TABLE[model][1]


class Keep:
    """Keeps a residual at even steps and returns it at odd ones."""

    def __init__(self, **options: Any) -> None:
        self.options = ResidualOptions(**options)

    def attend(self, call: Call) -> Tensor:
        store = call.shared.setdefault("residuals", ResidualStore(self.options))
        if not store.admit(call):
            return call.q
        if call.step.index % 2 == 0:
            precision = self.options.precision
            store.put(call, Residual.between(call.q, call.k, precision=precision))
            return call.q
        return store.get(call).add_to(call.k.clone())


class Generation:
    """Runs ``Keep`` over branches and layers as a bound model would run a method."""

    def __init__(
        self, make: Any, method: Keep, layers: int = 3, branches: Sequence[str] = ("c", "u")
    ) -> None:
        self.method, self.layers, self.branches = method, layers, branches
        self.run = Run()
        self.make = make
        self.memory: dict[tuple[str, int], dict[str, Any]] = {}
        self.outputs: dict[tuple[int, str, int], Tensor] = {}

    def call(self, index: int, branch: str, layer: int, total: int = 50) -> Call:
        seed = 1000 * index + 100 * self.branches.index(branch) + layer
        data = self.make(grid=(2, 4, 8), seed=seed, dtype=torch.float32)
        memory = self.memory.setdefault((branch, layer), {})
        call = data.call(index, memory, total)
        call.step = Step(index, total, index / total, branch, 0)
        call.layer, call.layers, call.shared = layer, self.layers, self.run.shared
        call.notes = self.run.notes
        return call

    def step(self, index: int, layers: Sequence[int] | None = None) -> None:
        for branch in self.branches:
            for layer in range(self.layers) if layers is None else layers:
                call = self.call(index, branch, layer)
                self.outputs[index, branch, layer] = self.method.attend(call)

    @property
    def store(self) -> ResidualStore:
        return self.run.shared["residuals"]

    def held(self) -> list[Tensor]:
        kept = [memory["residual0"] for memory in self.memory.values() if memory]
        tensors: list[Tensor] = []
        for item in kept:
            parts = (item.values, item.scale)
            for part in parts:
                tensors += part if isinstance(part, tuple) else [part] if part is not None else []
        return tensors


def size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layers", [None, 2, (1,)])
def test_what_is_held_is_what_was_declared(
    make: Any, precision: str, offload: bool, layers: Any
) -> None:
    run = Generation(make, Keep(precision=precision, offload=offload, layers=layers))
    run.step(0)
    plan = run.store.plan
    assert plan is not None
    assert size(run.held()) == plan.residual_bytes
    assert plan.host_bytes == (plan.residual_bytes if offload else 0)
    assert len(plan.branches) == 2
    assert len(run.held()) >= 2 * len(plan.held_layers) > 0
    kind = HostResidual if offload else Residual
    assert all(isinstance(m["residual0"], kind) for m in run.memory.values() if m)
    before = {id(t) for t in run.held()}
    run.step(1)
    run.step(2)
    assert size(run.held()) == plan.residual_bytes
    # Host memory is written over, not taken anew.
    assert ({id(t) for t in run.held()} == before) is offload


def test_plans_count_every_branch_with_its_own_shape(make: Any) -> None:
    run = Generation(make, Keep(), branches=("c",))
    run.step(0)
    first = run.store.plan.residual_bytes
    run.branches = ("c", "longer")
    call = run.call(0, "longer", 0)
    data = make(grid=(2, 4, 8), text=6, dtype=torch.float32)
    call.q, call.k, call.v = data.q, data.k, data.v
    run.method.attend(call)
    assert run.store.plan.residual_bytes == first + first * 70 // 64


@pytest.mark.parametrize(
    ("layers", "dense", "held"),
    [
        (None, (), (0, 1, 2, 3, 4, 5, 6, 7)),
        (None, (0, 7), (1, 2, 3, 4, 5, 6)),
        (1, (), (4,)),
        (2, (), (2, 6)),
        (4, (), (1, 3, 5, 7)),
        (8, (), (0, 1, 2, 3, 4, 5, 6, 7)),
        (3, (0, 7), (2, 4, 6)),
        ((5, 1), (), (1, 5)),
    ],
)
def test_layers_that_hold_one(layers: Any, dense: tuple[int, ...], held: tuple[int, ...]) -> None:
    assert ResidualOptions(layers=layers).held_layers(8, dense) == held


@pytest.mark.parametrize(("layers", "dense"), [(9, ()), (8, (0,)), ((8,), ()), ((1, 2), (2,))])
def test_layers_that_are_not_there_are_refused(layers: Any, dense: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="layers must be"):
        ResidualOptions(layers=layers).held_layers(8, dense)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "int8"},
        {"offload": 1},
        {"layers": 0},
        {"layers": True},
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"layers": 1.5},
        {"budget_gb": -1},
        {"budget_gb": float("nan")},
        {"budget_gb": "4"},
    ],
    ids=str,
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ResidualOptions(**wrong)


# --- refusal ---------------------------------------------------------------------------------


def suggestions(message: str) -> list[dict[str, Any]]:
    """The settings that a refusal proposes."""
    listed = message.split("what fits: ")[1].split("; ")
    found = []
    for entry in listed:
        settings = entry.split(" (")[0].split(", ")
        pairs = (setting.split("=") for setting in settings)
        found.append({name: ast.literal_eval(value) for name, value in pairs})
    return found


def test_a_residual_that_cannot_fit_is_refused_with_numbers_and_options() -> None:
    plan = plan_of("Wan2.1-14B", budget=40, host=100e9, budget_gb=40)
    with pytest.raises(ValueError, match="budget_gb=40") as refusal:
        plan.check()
    message = str(refusal.value)
    assert "at most 40.00 GB" in message
    assert "got 62.90 GB" in message
    assert "40 of 40 layers x 2 branches" in message
    assert "row statistics 0.97 GB" in message
    found = suggestions(message)
    assert found == [
        {"precision": "float8"},
        {"offload": True},
        {"precision": "float8", "offload": True},
        {"layers": 25},
    ]
    for options in found:
        fitting = replace(plan, options=replace(plan.options, **options))
        fitting.check()
        assert fitting.device_bytes <= 40e9
    assert not replace(plan, options=replace(plan.options, layers=26)).fits()


def test_suggestions_combine_where_one_setting_is_not_enough() -> None:
    with pytest.raises(ValueError, match="what fits") as refusal:
        plan_of("HunyuanVideo", budget=2).check()
    assert suggestions(str(refusal.value)) == [
        {"precision": "float8", "offload": True},
        {"layers": 2},
    ]
    # The statistics alone take more than this.
    with pytest.raises(ValueError, match="no setting fits"):
        plan_of("HunyuanVideo", budget=0.001, host=20e9).check()


def test_too_little_host_memory_is_refused() -> None:
    plan = plan_of("HunyuanVideo", budget=60, host=30e9, offload=True)
    with pytest.raises(ValueError, match="of host memory") as refusal:
        plan.check()
    assert "at most 30.00 GB of host memory" in str(refusal.value)
    assert {"offload": False} in suggestions(str(refusal.value))
    assert {"precision": "float8"} in suggestions(str(refusal.value))


@pytest.mark.parametrize("branches", [("c",), ("c", "u")])
def test_refusal_comes_in_the_first_step(make: Any, branches: tuple[str, ...]) -> None:
    probe = Generation(make, Keep(), branches=branches)
    probe.step(0)
    need = probe.store.plan.device_bytes
    run = Generation(make, Keep(budget_gb=(need - 1) / 1e9), branches=branches)
    with pytest.raises(ValueError, match="expected the residual"):
        run.step(0)
    # The first call of the branch that is too many; nothing of it was computed or kept.
    assert (0, branches[-1], 0) not in run.outputs
    # A second try is refused as well.
    with pytest.raises(ValueError, match="expected the residual"):
        run.method.attend(run.call(0, branches[-1], 0))
    Generation(make, Keep(budget_gb=need / 1e9), branches=branches).step(0)


def test_settings_give_way_in_order_until_the_residual_fits() -> None:
    for budget, host, expected in (
        (70, 100e9, {}),
        (40, 100e9, {"precision": "float8"}),
        (8, 100e9, {"offload": True}),
        (8, 50e9, {"precision": "float8", "offload": True}),
        (8, 1e9, {"precision": "float8", "layers": 9}),
    ):
        plan = plan_of("Wan2.1-14B", budget=budget, host=host).adapted()
        assert plan is not None and plan.fits()
        options = ResidualOptions(**{"budget_gb": None, **expected})
        assert (plan.options.precision, plan.options.offload, plan.options.layers) == (
            options.precision, options.offload, options.layers,
        )  # fmt: skip
    assert plan_of("Wan2.1-14B", budget=0.001, host=1e3).adapted() is None


def test_adapting_leaves_room_for_the_twin_of_the_first_branch(make: Any) -> None:
    probe = Generation(make, Keep(), branches=("c",))
    probe.step(0)
    one = probe.store.plan.device_bytes
    # Both branches fit in eight bits, or one of them as it is.
    run = Generation(make, Keep(budget_gb=1.2 * one / 1e9, adapt=True), branches=("c", "u"))
    run.step(0)
    assert run.store.options.precision != "native"
    assert run.store.plan.fits()
    assert len(run.store.plan.branches) == 2
    alone = Generation(make, Keep(budget_gb=1.2 * one / 1e9, adapt=True), branches=("cond_uncond",))
    alone.step(0)
    assert alone.store.options.precision == "native"


def test_adapting_keeps_nothing_where_nothing_fits(make: Any) -> None:
    run = Generation(make, Keep(budget_gb=0.0, adapt=True), branches=("c", "u"))
    store = ResidualStore(run.method.options)
    for branch in ("c", "u"):
        assert not store.admit(run.call(0, branch, 0))
    assert "none for branch 'u'" in run.run.notes["residual of u"]


def test_cpu_has_no_limit_and_says_so(make: Any) -> None:
    run = Generation(make, Keep())
    run.step(0)
    assert run.store.plan.budget is None
    assert "no limit" in run.run.notes["residual"]
    assert "3 of 3 layers x 2 branches" in run.run.notes["residual"]


def test_half_of_the_free_device_memory_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3_000)
    assert device_budget(ResidualOptions(), device) == 6_000
    assert device_budget(ResidualOptions(), device, models=2) == 3_000
    assert device_budget(ResidualOptions(budget_gb=2.5), device, models=2) == 2_500_000_000
    assert device_budget(ResidualOptions(), CPU) is None


def test_budgets_are_measured_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(residual_module, "device_budget", lambda *_: asked.append(1) or int(1e9))
    run = Generation(make, Keep())
    for index in range(3):
        run.step(index)
    assert len(asked) == 1
    assert "at most 1.00 GB" in run.run.notes["residual"]


# --- host memory -----------------------------------------------------------------------------


class LateTransfer(PlainTransfer):
    """Does every copy at the last moment, in order, as a busy side stream would.

    What a target holds before it was waited for is NaN (or a byte pattern that is).
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.pending: list[LateCopy] = []
        self.events: list[str] = []
        self.names: dict[int, str] = {}

    def name(self, tensors: Sequence[Tensor]) -> str:
        return self.names.get(tensors[0].data_ptr(), "?")

    def copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copy:
        is_save = sources[0].data_ptr() not in self.names
        if not is_save:
            for target in targets:
                target.fill_(0x7F)
        name = self.name(targets if is_save else sources)
        self.events.append(f"{'save' if is_save else 'fetch'} {name}")
        self.pending.append(LateCopy(self, sources, targets, name))
        return self.pending[-1]


class LateCopy(Copy):
    def __init__(self, owner: LateTransfer, sources: Any, targets: Any, name: str) -> None:
        self.owner, self.sources, self.targets, self.name = owner, sources, targets, name

    def wait(self) -> None:
        self.owner.events.append(f"wait {self.name}")
        while self in self.owner.pending:
            first = self.owner.pending.pop(0)
            for source, target in zip(first.sources, first.targets, strict=True):
                target.copy_(source)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateTransfer:
    """Replaces the transfer and names host memory by the branch and layer it belongs to."""
    transfer = LateTransfer()
    monkeypatch.setattr(residual_module, "transfer_for", lambda _: transfer)
    monkeypatch.setattr(transfer_module, "SLAB_BYTES", 768)
    reserve = ResidualStore._reserve

    def named(store: ResidualStore, call: Call, kept: Residual) -> HostResidual:
        held = reserve(store, call, kept)
        transfer.names[held.values[0].data_ptr()] = f"{call.step.branch}{call.layer}"
        return held

    monkeypatch.setattr(ResidualStore, "_reserve", named)
    return transfer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_offloading_changes_nothing(make: Any, late: LateTransfer, precision: str) -> None:
    here = Generation(make, Keep(precision=precision))
    away = Generation(make, Keep(precision=precision, offload=True))
    for index in (0, 1, 2, 3, 5, 6, 7):
        for run in (here, away):
            run.step(index)
    assert here.outputs.keys() == away.outputs.keys()
    for key, out in here.outputs.items():
        assert torch.equal(out, away.outputs[key]), key
    # Pieces really were cut.
    held = away.memory["c", 1]["residual0"]
    assert len(held.values) > 1
    assert (len(held.scale) > 0) is (precision == "float8")


def test_each_fetch_begins_one_use_ahead(make: Any, late: LateTransfer) -> None:
    run = Generation(make, Keep(offload=True))
    order = [f"{b}{n}" for b in "cu" for n in range(3)]
    run.step(0)
    assert [e for e in late.events if e.startswith("save")] == [f"save {name}" for name in order]
    assert not any(event.startswith("fetch") for event in late.events)
    for index in (1, 2, 3, 5):
        late.events.clear()
        run.step(index)
        fetches = [event for event in late.events if event.startswith("fetch")]
        if index == 2:
            # The first of the next step follows the last save. What was fetched before the step is
            # of no use, as the step replaces it.
            assert late.events[:2] == ["wait c0", "save c0"]
            assert late.events[-3:] == ["wait u1", "save u2", "fetch c0"]
            assert len(fetches) == 1
            continue
        # The last save is settled. The very first fetch could not be foreseen.
        start = {1: ["wait u2", "fetch c0"], 3: ["wait u2"], 5: []}[index]
        assert late.events[: len(start)] == start
        # Each residual is waited for with the next one not yet begun, and used with it under way.
        uses = [
            f"{what} {name}"
            for a, b in zip(order, [*order[1:], "c0"], strict=True)
            for what, name in (("wait", a), ("fetch", b))
        ]
        assert late.events[len(start) :] == uses


def test_no_more_than_two_residuals_are_on_the_device(
    make: Any, late: LateTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: weakref.WeakSet[Residual] = weakref.WeakSet()
    alive: list[int] = []
    fetch, put = ResidualStore._fetch, ResidualStore.put

    def watched_fetch(store: ResidualStore, call: Call, held: HostResidual) -> Any:
        ahead = fetch(store, call, held)
        there.add(ahead.target)
        alive.append(len(there))
        return ahead

    def watched_put(store: ResidualStore, call: Call, kept: Residual, slot: int = 0) -> None:
        there.add(kept)
        put(store, call, kept, slot)

    monkeypatch.setattr(ResidualStore, "_fetch", watched_fetch)
    monkeypatch.setattr(ResidualStore, "put", watched_put)
    run = Generation(make, Keep(offload=True), layers=4)
    for index in range(4):
        run.step(index)
    # 8 uses a step, the first of which was not foreseen, and one fetch for a step that was dense.
    assert len(alive) == 18
    assert max(alive) == IN_FLIGHT


def test_a_wrong_guess_costs_only_a_fetch(make: Any, late: LateTransfer) -> None:
    here, away = (Generation(make, Keep(offload=offload)) for offload in (False, True))
    for index, layers in ((0, None), (1, (0, 2)), (3, (2, 0, 1)), (4, (1,)), (5, (0, 1, 2))):
        for run in (here, away):
            run.step(index, layers)
    for key, out in here.outputs.items():
        assert torch.equal(out, away.outputs[key]), key


def test_residuals_that_are_amended_at_each_step(make: Any, late: LateTransfer) -> None:
    # As a rotating refresh does: take it, renew a part, keep it again.
    results, names = [], ["c0", "c1", "c2", "u0", "u1", "u2"]
    for offload in (False, True):
        run = Generation(make, Keep(offload=offload))
        run.step(0)
        seen = []
        for index in range(1, 5):
            late.events.clear()
            for branch in run.branches:
                for layer in range(run.layers):
                    call = run.call(index, branch, layer)
                    kept = run.store.get(call)
                    kept.values[:, index::4] += call.q[:, index::4]
                    seen.append(kept.values.clone())
                    run.store.put(call, kept)
        results.append(seen)
    assert all(torch.equal(here, away) for here, away in zip(*results, strict=True))
    # The next one is on its way while the current one is amended.
    fetches = [event for event in late.events if not event.startswith("wait")]
    expected = [e for a, b in zip(names, [*names[1:], "c0"], strict=True) for e in (b, a)]
    assert fetches == [f"{'fetch' if n % 2 == 0 else 'save'} {x}" for n, x in enumerate(expected)]


def test_several_residuals_a_layer(make: Any, late: LateTransfer) -> None:
    store = ResidualStore(ResidualOptions(offload=True), tensors=2)
    run = Generation(make, Keep(), layers=2, branches=("c",))
    calls = [run.call(0, "c", layer) for layer in range(2)]
    assert all(store.admit(call) for call in calls)
    for call in calls:
        store.put(call, Residual(call.q.clone()), slot=0)
        store.put(call, Residual(call.k.clone()), slot=1)
    held = [part for c in calls for n in (0, 1) for part in c.memory[f"residual{n}"].values]
    assert store.plan.residual_bytes == size(held)
    for call in calls:
        assert torch.equal(store.get(call, 1).values, call.k)
        assert torch.equal(store.get(call, 0).values, call.q)


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_dropped_is_gone(make: Any, late: LateTransfer, offload: bool) -> None:
    run = Generation(make, Keep(offload=offload), layers=2, branches=("c",))
    run.step(0)
    run.step(1)
    for layer in range(2):
        run.store.drop(run.call(2, "c", layer))
    assert all("residual0" not in memory for memory in run.memory.values())
    with pytest.raises(KeyError):
        run.store.get(run.call(3, "c", 0))
    run.step(4)
    run.step(5)
    here = Generation(make, Keep(), layers=2, branches=("c",))
    here.step(4)
    here.step(5)
    assert torch.equal(run.outputs[5, "c", 1], here.outputs[5, "c", 1])


def test_host_memory_is_cut_from_slabs_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "SLAB_BYTES", 1024)
    transfer = PlainTransfer(CPU)
    arena = HostArena(transfer)
    first, second = arena.take(700), arena.take(1500)
    assert [piece.numel() for piece in first] == [700]
    assert [piece.numel() for piece in second] == [256, 1024, 220]
    assert second[0].data_ptr() == first[0].data_ptr() + 768
    for number, piece in enumerate((*first, *second)):
        piece.fill_(number)
    assert [int(p.unique()) for p in (*first, *second)] == [0, 1, 2, 3]
    assert arena.take(0) == ()
    slabs = {second[1].data_ptr()}
    free = transfer.host_budget
    monkeypatch.setattr(
        transfer_module.psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})()
    )
    assert free() == 800
    del arena
    # Three slabs are there for the next generation, and count as available.
    assert free() == 800 + 3 * 1024
    again = HostArena(transfer)
    pieces = again.take(3 * 1024)
    assert free() == 800
    assert slabs <= {piece.data_ptr() for piece in pieces}
    transfer.trim()
    del again
    transfer.trim()
    assert free() == 800


def test_one_transfer_serves_the_process() -> None:
    assert transfer_for(CPU) is transfer_for(torch.device("cpu"))
    assert isinstance(transfer_for(CPU), PlainTransfer)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_offloading_changes_nothing_on_a_gpu(make: Any, precision: str) -> None:
    device = torch.device("cuda")
    results = []
    for offload in (False, True):
        run = Generation(make, Keep(precision=precision, offload=offload), layers=6)
        build = run.call

        def on_gpu(*args: Any, build: Any = build) -> Call:
            call = build(*args)
            # Large enough for copies to be late, were nobody to wait for them.
            call.q, call.k = (
                x.to(device, torch.bfloat16).repeat(1, 64, 4, 8).contiguous()
                for x in (call.q, call.k)
            )
            return call

        run.call = on_gpu  # type: ignore[method-assign]
        for index in range(6):
            run.step(index)
        results.append(run)
    for key, out in results[0].outputs.items():
        assert torch.equal(out, results[1].outputs[key]), key
    assert all(piece.is_pinned() for piece in results[1].held())
