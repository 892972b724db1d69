"""Re-ttention without weights: rho, the residual, the ramp, the schedule and the memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse import SparseConfig, SparseProcessor
from dit_sparse.layout import Ordering
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call
from dit_sparse.methods.residual_values import Residual
from dit_sparse.methods.rettention import MASKS, Rettention, softmax_share
from dit_sparse.processors.hooks import tells_steps
from dit_sparse.processors.run import Run
from dit_sparse.schedule import PeriodicSchedule, Phase, Step

# Statistics in step 0 and then in every fifth.
SPARSITY = {"window": 0.9, "window3d": 0.7, "adaspa": 0.7}
TEXTS = [(0, "video_text"), (1, "text_video"), (5, "video_text"), (226, "text_video")]


def build(mask: str = "adaspa", **options: Any) -> Rettention:
    return Rettention(
        **{"sparsity": SPARSITY[mask], "mask": mask, "warmup": 0, "period": 5, **options}
    )


def kept_pairs(method: Rettention, data: Any, memory: dict[str, Any]) -> Tensor:
    """The token pairs that the mask at hand keeps, in the model's order."""
    return data.kept(memory["mask"], None if method.mask == "window" else method.tile)


def phases(method: Rettention, total: int) -> list[Phase]:
    """The phases of a run in which no call is skipped."""
    schedule = PeriodicSchedule(method.warmup, method.period)
    found: list[Phase] = []
    kept = None
    for index in range(total):
        found.append(schedule.phase(Step(index, total, index / total, "cond", 0), kept))
        kept = index if found[-1] is Phase.SEARCH else kept
    return found


# --- 1: what a dense step keeps --------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_rho_and_residual_are_the_kept_share_and_the_dropped_part(
    make: Any, mask: str, text: int, order: str
) -> None:
    data, memory = make(grid=(4, 10, 20), text=text, order=order, batch=2), {}
    method = build(mask)
    call = data.call(0, memory)
    out = method.attend(call)
    assert call.phase is Phase.SEARCH
    assert torch.equal(out, data.attention())
    keep = kept_pairs(method, data, memory)
    assert not keep.all()
    weights = data.softmax()
    rho, residual = memory["rho"], memory["residual0"].values
    assert rho.shape == (2, 2, data.layout.tokens)
    assert rho.dtype == torch.float32
    assert ((rho > 0) & (rho <= 1)).all()
    assert (rho - (weights * keep).sum(-1)).abs().max() < 1e-6
    dropped = torch.einsum("bhij,bjhd->bihd", weights * ~keep, data.v)
    # rho is kept in fp32, and the residual makes up for its rounding.
    assert (residual - dropped).abs().max() < 1e-6
    factor = rho.transpose(1, 2)[..., None].double()
    assert (factor * data.attention(keep) + residual - out).abs().max() < 1e-12


def test_rho_is_the_exponential_of_the_difference_of_lse() -> None:
    dense = torch.tensor([[[0.0, 3.0, 800.0, -5.0]]]).double()
    share = torch.tensor([[[0.5, 1.0, 0.01, 0.0]]]).double()
    rho = softmax_share(dense + share.log(), dense)
    assert rho.dtype == torch.float32
    torch.testing.assert_close(rho, share.float())
    # A row that has no keys at all has no share either.
    empty = torch.full((1, 1, 2), -math.inf)
    assert (softmax_share(empty, empty) == 0).all()


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_adaspa_mask_is_the_one_that_adaspa_finds(make: Any, adaptive: bool) -> None:
    ours, theirs = {}, {}
    method = build("adaspa", head_adaptive=adaptive, period=2)
    for index in (0, 2):
        data = make(text=5, order="text_video", heads=4, seed=index)
        data.q[:, :, :2] *= 4
        method.attend(data.call(index, ours))
        adaspa = AdaSpa(method.sparsity, (index + 1,), head_adaptive=adaptive, row_stride=1)
        adaspa.attend(data.call(index, theirs))
        assert torch.equal(ours["mask"].dense(), theirs["mask"].dense())
        theirs.clear()


# --- 2, 3: exactness -------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_frozen_operands_stay_dense_whatever_the_mask(
    make: Any, mask: str, clamp: bool, text: int, order: str
) -> None:
    data, memory = make(text=text, order=order, batch=2), {}
    method = build(mask, ramp=0.0, clamp=clamp)
    for index in range(8):
        call = data.call(index, memory)
        out = method.attend(call)
        assert (out - data.attention()).abs().max() < 1e-12
        assert call.phase is (Phase.SEARCH if index % 5 == 0 else Phase.SPARSE)
    keep = kept_pairs(method, data, memory)
    if not keep.all():
        # Dropping without correction would have shown.
        assert (data.attention(keep) - data.attention()).abs().max() > 1e-3
    torch.testing.assert_close(call.head_density.double().mean(), keep.double().mean())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("text", [0, 5])
def test_a_full_mask_is_dense_for_any_schedule(make: Any, mask: str, text: int) -> None:
    for warmup, period in ((0, 1), (0, 3), (2, 2), (0.5, 4)):
        memory: dict[str, Any] = {}
        method = build(mask, sparsity=0.0, warmup=warmup, period=period)
        for index in range(7):
            data = make(text=text, order="text_video", seed=index)
            call = data.call(index, memory, total=7)
            assert (method.attend(call) - data.attention()).abs().max() < 1e-10
            if "rho" in memory:
                assert (memory["rho"] == 1).all()
            if "residual0" in memory:
                assert memory["residual0"].values.abs().max() < 1e-10


def test_without_the_clamp_the_ramp_scales_rows_that_drop_nothing(make: Any) -> None:
    text = slice(-70, None)
    for clamp in (True, False):
        memory: dict[str, Any] = {}
        method = build("window3d", clamp=clamp)
        for index in range(4):
            data = make(text=70, seed=index)
            out = method.attend(data.call(index, memory))
        ratio = out[:, text] / data.attention()[:, text]
        expected = 1.0 if clamp else 1.08
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=0, atol=1e-6)


def test_dense_and_search_steps_return_the_models_own_tensor(make: Any) -> None:
    data, memory = make(), {}
    method = build(warmup=2, period=2)
    own = data.attention()
    for index, is_own in enumerate([True, True, True, False, True, False]):
        call = data.call(index, memory)
        before = own.clone()
        call.dense_attention = lambda with_lse: (own, None)
        assert (method.attend(call) is own) is is_own
        # Not even the residual may be computed in its place.
        assert torch.equal(own, before)


# --- 4: equivariance -------------------------------------------------------------------------


def test_permuting_tokens_permutes_the_output(make: Any) -> None:
    # Blocks change places, and tokens inside of blocks: the mask found is permuted along.
    rng = torch.Generator().manual_seed(5)
    within = torch.stack([torch.randperm(64, generator=rng) for _ in range(8)])
    perm = (torch.randperm(8, generator=rng)[:, None] * 64 + within).flatten()
    order = Ordering.from_perm(perm)
    method = build(tile=None)
    plain, moved = {}, {}
    for index in range(3):
        data = make(seed=index)
        expected = method.attend(data.call(index, plain))
        data.q, data.k, data.v = (order.apply(x) for x in (data.q, data.k, data.v))
        out = method.attend(data.call(index, moved))
        assert (order.undo(out) - expected).abs().max() < 1e-10
    assert not torch.equal(plain["mask"].dense(), moved["mask"].dense())


# --- 5: the ramp -----------------------------------------------------------------------------


@pytest.mark.parametrize("clamp", [True, False])
def test_the_ramp_grows_after_use_and_starts_anew(make: Any, clamp: bool) -> None:
    memory: dict[str, Any] = {}
    method = build("window3d", ramp=0.04, clamp=clamp)
    largest = 0.0
    for index in range(13):
        data = make(text=5, seed=index, sharp=1.0)
        out = method.attend(data.call(index, memory))
        since = index % 5
        if since == 0:
            assert memory["kept"] == index
            rho, residual = memory["rho"].clone(), memory["residual0"].values.clone()
            continue
        factor = rho + (since - 1) * 0.04
        if clamp:
            factor = factor.clamp(max=1)
        largest = max(largest, float(factor.max()))
        keep = kept_pairs(method, data, memory)
        expected = factor.transpose(1, 2)[..., None].double() * data.attention(keep) + residual
        assert (out - expected).abs().max() < 1e-6
        # What was kept is not written over.
        assert torch.equal(memory["rho"], rho)
        assert torch.equal(memory["residual0"].values, residual)
    assert largest == pytest.approx(1.0 if clamp else 1.12)


def test_steps_that_a_cache_skips_count_in_the_ramp(make: Any) -> None:
    memory: dict[str, Any] = {}
    method = build("window3d", ramp=0.1)
    method.attend(make(seed=0).call(0, memory))
    rho = memory["rho"].double()
    residual = memory["residual0"].values
    data = make(seed=1)
    out = method.attend(data.call(3, memory))
    factor = (rho + 0.2).clamp(max=1).transpose(1, 2)[..., None]
    expected = factor * data.attention(kept_pairs(method, data, memory)) + residual
    assert (out - expected).abs().max() < 1e-6


# --- 8: row mass -----------------------------------------------------------------------------


def test_the_row_mass_of_rescaled_attention_is_rho(make: Any) -> None:
    data, memory = make(text=5), {}
    # With values of one the output is the row mass; the residual holds what is missing to one.
    data.v = torch.ones_like(data.v)
    method = build("window3d", ramp=0.0)
    method.attend(data.call(0, memory))
    memory["residual0"] = Residual(torch.zeros_like(data.v))
    mass = method.attend(data.call(1, memory))[..., 0].transpose(1, 2)
    assert (mass - memory["rho"]).abs().max() < 1e-12
    drops = ~kept_pairs(method, data, memory).all(-1).expand(1, 2, -1)
    assert (mass[drops] < 1 - 1e-6).all()
    assert ((mass[~drops] - 1).abs() < 1e-6).all()
    assert drops.any()
    assert not drops.all()


# --- 7: the schedule -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "warmup", "searches", "sparse"),
    [
        (20, 0.25, [5, 10, 15], 12),  # PixArt
        (50, 0.2, list(range(10, 50, 5)), 32),  # Hunyuan-DiT
        (50, 0.3, list(range(15, 50, 5)), 28),  # CogVideoX
        (50, 15, list(range(15, 50, 5)), 28),
    ],
)
def test_schedules_of_the_paper(
    total: int, warmup: float, searches: list[int], sparse: int
) -> None:
    found = phases(Rettention(warmup=warmup), total)
    assert [n for n, phase in enumerate(found) if phase is Phase.SEARCH] == searches
    assert found[: searches[0]] == [Phase.DENSE] * searches[0]
    assert found.count(Phase.SPARSE) == sparse


@pytest.mark.parametrize(
    ("total", "warmup", "period", "expected"),
    [
        (1, 0.3, 5, "d"),
        (1, 0, 5, "d"),
        (2, 0, 5, "cs"),
        (2, 0.3, 5, "dd"),
        (4, 0.3, 5, "dcss"),
        (8, 0.25, 3, "ddcsscss"),
        (9, 0.25, 3, "ddcsscssd"),
        (5, 0, 1, "ccccd"),
        (5, 1.0, 5, "ddddd"),
        (5, 9, 5, "ddddd"),
    ],
)
def test_schedules_of_few_steps(total: int, warmup: Any, period: int, expected: str) -> None:
    names = {Phase.DENSE: "d", Phase.SEARCH: "c", Phase.SPARSE: "s"}
    found = phases(Rettention(warmup=warmup, period=period), total)
    assert "".join(names[phase] for phase in found) == expected


def test_an_unknown_number_of_steps_is_read_on_the_noise_scale() -> None:
    schedule = PeriodicSchedule(0.3, 2)
    progress = [0.0, 0.2, 0.4, 0.6, 0.8, 0.95]
    found, kept = [], None
    for index, share in enumerate(progress):
        found.append(schedule.phase(Step(index, None, share, "cond", 0), kept))
        kept = index if found[-1] is Phase.SEARCH else kept
    d, c, s = Phase.DENSE, Phase.SEARCH, Phase.SPARSE
    assert found == [d, d, c, s, c, s]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # The step that would have kept statistics is skipped: the next call does.
        ((0, 1, 2, 3, 4, 6, 7, 11), "csssscsc"),
        ((3, 4), "cs"),
    ],
)
def test_a_skipped_dense_step_is_made_up_for(
    make: Any, steps: tuple[int, ...], expected: str
) -> None:
    memory: dict[str, Any] = {}
    method = build("window3d")
    seen = ""
    for index in steps:
        call = make(grid=(2, 8, 16), seed=index).call(index, memory)
        method.attend(call)
        seen += {Phase.SEARCH: "c", Phase.SPARSE: "s"}[call.phase]
    assert seen == expected


# --- text, padding, batch --------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("text", "order"), TEXTS[1:])
def test_text_is_exact_and_is_seen_by_everything(
    make: Any, mask: str, text: int, order: str
) -> None:
    memory: dict[str, Any] = {}
    method = build(mask)
    is_text = None
    for index in range(3):
        data = make(grid=(4, 10, 20), text=text, order=order, seed=index)
        out = method.attend(data.call(index, memory))
        is_text = data.layout.coords()[:, 0] < 0
        assert (out - data.attention())[:, is_text].abs().max() < 1e-6
    keep = kept_pairs(method, data, memory)
    assert keep[..., is_text].all()
    assert keep[..., is_text, :].all()
    assert not keep.all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ["video_text", "text_video"])
def test_padding_is_never_read(make: Any, mask: str, order: str) -> None:
    results = []
    for poison in (0.0, 50.0, float("nan")):
        memory: dict[str, Any] = {}
        outs = []
        for index in range(3):
            data = make(text=21, order=order, batch=2, seed=index)
            data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
            end = data.layout.text if order == "text_video" else data.layout.tokens
            data.key_valid[0, end - 9 : end] = False
            data.k[~data.key_valid] = data.v[~data.key_valid] = poison
            outs.append(build(mask).attend(data.call(index, memory)))
        assert torch.stack(outs).isfinite().all()
        results.append((*outs, memory["rho"], memory["residual0"].values))
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)


def test_rows_whose_kept_keys_are_all_padding_return_what_they_had(make: Any) -> None:
    memory: dict[str, Any] = {}
    method = build("window3d", sparsity=0.9, tile=None)
    outs = []
    for index in range(2):
        data = make(grid=(4, 8, 16), seed=index)
        data.key_valid = torch.ones(1, 512, dtype=torch.bool)
        # The third block of 64: its own rows keep nothing else.
        data.key_valid[:, 128:192] = False
        outs.append(method.attend(data.call(index, memory)))
    assert (memory["rho"][..., 128:192] == 0).all()
    assert torch.equal(outs[1][:, 128:192], outs[0][:, 128:192])
    assert not torch.equal(outs[1][:, :128], outs[0][:, :128])


@pytest.mark.parametrize("mask", MASKS)
def test_batch_elements_are_apart(make: Any, mask: str) -> None:
    method = build(mask)
    together: dict[str, Any] = {}
    alone: list[dict[str, Any]] = [{}, {}]
    for index in range(3):
        both = make(text=7, batch=2, seed=index)
        both.key_valid = torch.ones(2, both.layout.tokens, dtype=torch.bool)
        both.key_valid[1, -5:] = False
        out = method.attend(both.call(index, together))
        for element, memory in enumerate(alone):
            part = slice(element, element + 1)
            one = replace(both, q=both.q[part], k=both.k[part], v=both.v[part])
            one.key_valid = both.key_valid[part]
            assert (method.attend(one.call(index, memory)) - out[part]).abs().max() < 1e-12


# --- branches, generations, layers -----------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
def test_branches_and_generations_are_apart(make: Any, offload: bool) -> None:
    run, total = Run(), 8
    timesteps = tuple(1000.0 - 100 * index for index in range(total))
    method = build(warmup=2, period=3, offload=offload)
    c, d, s = Phase.SEARCH, Phase.DENSE, Phase.SPARSE
    expected = [d, d, c, s, s, c, s, s]

    def inputs(which: int, index: int, generation: int) -> Any:
        return make(grid=(2, 8, 16), seed=100 * which + index + 1000 * generation)

    for generation in range(2):
        alone: list[dict[str, Any]] = [{}, {}]
        seen: list[list[Phase]] = [[], []]
        for index in range(total):
            for which in range(2):
                data = inputs(which, index, generation)
                timestep = torch.tensor([timesteps[index]])
                branch = run.enter(0, timestep, data.layout, timesteps, data.q)
                memory = branch.memory.setdefault(0, {})
                if index == 0:
                    assert memory == {}
                    assert (run.shared == {}) is (which == 0)
                call = data.call(index, memory, total)
                call.step, call.shared, call.notes = branch.step, run.shared, run.notes
                out = method.attend(call)
                run.note(call)
                seen[which].append(call.phase)
                reference = build(warmup=2, period=3).attend(data.call(index, alone[which], total))
                assert torch.equal(out, reference)
                assert branch.step.generation == generation
        assert seen == [expected, expected]
        assert "2 branches" in run.notes["residual"]
    # Both were let go of in the last step; the most that was held is known nevertheless.
    assert all("residual0" not in b.memory[0] for b in run.branches.values())
    plan = run.shared["residuals"].plan
    assert run.cache_bytes >= plan.residual_bytes + plan.statistics_bytes
    assert run.held_bytes() < run.cache_bytes
    run.end_generation()
    assert run.shared == {}
    assert run.notes


def test_layers_without_a_residual_stay_dense(make: Any) -> None:
    method = build("window3d", layers=2)
    memories: list[dict[str, Any]] = [{} for _ in range(5)]
    shared: dict[str, Any] = {}
    for index in range(3):
        dense = []
        for layer, memory in enumerate(memories):
            data = make(grid=(2, 8, 16), seed=10 * index + layer)
            call = data.call(index, memory)
            call.layer, call.layers, call.shared, call.dense_layers = layer, 5, shared, (0,)
            out = method.attend(call)
            if call.phase is Phase.DENSE:
                dense.append(layer)
                assert torch.equal(out, data.attention())
                assert memory == {}
        assert dense == [0, 1, 3]
    assert shared["residuals"].plan.held_layers == (2, 4)


def test_a_residual_that_cannot_fit_is_refused_in_the_warm_up(make: Any) -> None:
    data = make(grid=(2, 8, 16), dtype=torch.float32)
    method = build(warmup=10, budget_gb=1e-6)
    with pytest.raises(ValueError, match=r"what fits|no setting fits"):
        method.attend(data.call(0, {}))


@pytest.mark.parametrize("precision", ["native", "bfloat16", "float8"])
@pytest.mark.parametrize("mask", MASKS)
def test_memory_is_what_was_declared(make: Any, mask: str, precision: str) -> None:
    data, memory = make(text=5, batch=2, dtype=torch.float32), {}
    call = data.call(0, memory)
    method = build(mask, precision=precision)
    method.attend(call)
    plan = call.shared["residuals"].plan
    kept = memory["residual0"]
    tensors = [kept.values] if kept.scale is None else [kept.values, kept.scale]
    assert plan.residual_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert plan.statistics_bytes == memory["rho"].numel() * 4
    assert set(memory) == {"mask", "rho", "residual0", "kept"}
    out = method.attend(data.call(1, memory))
    error = (out - data.attention()).abs().max()
    bound = {"native": 1e-6, "bfloat16": 2**-8, "float8": 2**-4}[precision]
    # Operands did not move: what is left is the rounding of the residual, and the ramp's none.
    assert error <= bound * kept_values_size(data, memory) + 1e-6


def kept_values_size(data: Any, memory: dict[str, Any]) -> float:
    rho = memory["rho"].transpose(1, 2)[..., None]
    return float(((1 - rho) * data.v.abs().max()).max())


def test_the_last_step_keeps_nothing(make: Any) -> None:
    method = build("window3d", period=3)
    memory: dict[str, Any] = {}
    for index, expected in enumerate(["c", "s", "s", "c", "s"]):
        call = make(grid=(2, 8, 16), seed=index).call(index, memory, total=5)
        method.attend(call)
        assert call.phase.value[1] == {"c": "e", "s": "p"}[expected]
        assert ("residual0" in memory) is (index < 4)


def test_a_longer_branch_is_planned_for(make: Any) -> None:
    # Prompts of different length make branches of different size.
    shared: dict[str, Any] = {}
    for branch, text in (("cond", 5), ("uncond", 70)):
        call = make(grid=(2, 8, 16), text=text).call(0, {})
        call.step, call.shared = replace(call.step, branch=branch), shared
        build().attend(call)
    sizes = [shape.tokens for _, shape in shared["residuals"].plan.branches]
    assert sizes == [261, 326]


# --- the baseline ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_without_correction_the_same_mask_drops(make: Any, mask: str) -> None:
    corrected, dropped = {}, {}
    for index in range(3):
        data = make(text=5, seed=index)
        build(mask).attend(data.call(index, corrected))
        call = data.call(index, dropped)
        out = build(mask, correct=False).attend(call)
        assert call.phase is (Phase.SEARCH if index == 0 else Phase.SPARSE)
        keep = kept_pairs(build(mask), data, dropped)
        expected = data.attention() if index == 0 else data.attention(keep)
        assert (out - expected).abs().max() < 1e-10
        assert torch.equal(dropped["mask"].dense(), corrected["mask"].dense())
    assert set(dropped) == {"mask", "kept"}


def test_correction_follows_operands_that_drift(make: Any) -> None:
    method = build("window3d", ramp=0.0)
    errors = {}
    for correct in (True, False):
        memory: dict[str, Any] = {}
        data = make(dtype=torch.float32)
        other = make(seed=1, dtype=torch.float32)
        replace(method, correct=correct).attend(data.call(0, memory))
        for name in "qkv":
            x = getattr(data, name)
            setattr(data, name, x + 0.05 * getattr(other, name))
        out = replace(method, correct=correct).attend(data.call(1, memory))
        errors[correct] = float((out - data.attention()).norm() / data.attention().norm())
    assert errors[True] < 0.3 * errors[False]


# --- cost ------------------------------------------------------------------------------------


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("mask", MASKS)
def test_no_matrix_of_all_pairs_is_ever_made(make: Any, mask: str) -> None:
    data = make(grid=(4, 16, 32), text=70, heads=1, dtype=torch.float32)
    memory: dict[str, Any] = {}
    dense = data.attention()
    with LargestOutput() as largest:
        for index in range(3):
            call = data.call(index, memory)
            call.dense_attention = lambda with_lse: (dense, None)
            build(mask).attend(call)
    assert 0 < largest.numel < data.layout.tokens**2 / 2


def test_static_masks_need_no_block_mass_and_the_lse_of_the_dense_pass_is_used(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    for name in ("row_lse", "block_mass"):
        original = getattr(Call, name)

        def counted(call: Call, *args: Any, name: str = name, original: Any = original) -> Tensor:
            passes.append(name)
            return original(call, *args)

        monkeypatch.setattr(Call, name, counted)
    data = make()
    lse = data.call().row_lse()
    passes.clear()
    for mask in MASKS:
        memory: dict[str, Any] = {}
        for index in range(2):
            call = data.call(index, memory)
            call.dense_attention = lambda with_lse: (data.attention(), lse if with_lse else None)
            build(mask).attend(call)
    assert passes == ["block_mass"]


# --- on a model ------------------------------------------------------------------------------


def test_a_model_runs_it_and_reports_the_memory() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()
    method = build("adaspa", offload=True, precision="float8")
    processor = SparseProcessor(SparseConfig(method, dense_layers=(1,)))
    processor.install(model)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index in range(3):
            for branch in ("cond", "uncond"):
                fields = {"step_index": index, "num_inference_steps": 50}
                fields = fields if tells_steps(model) else {}
                with model.cache_context(branch, **fields):
                    model(
                        torch.randn(1, 16, 4, 16, 16, generator=rng),
                        torch.tensor([900 - 10 * index]),
                        torch.randn(1, 8, 32, generator=rng),
                    )
    report = processor.report()
    # 256 tokens of 24 values at one byte and two fp32 scales, two layers and two branches.
    held = 2 * 2 * 256 * (24 + 2 * 4)
    assert len(report.notes) == 1
    assert f"residual: {held / 1e9:.2f} GB in host memory" in report.notes[0]
    assert "2 of 3 layers x 2 branches" in report.notes[0]
    assert report.notes[0] in str(report)
    assert report.cache_bytes >= held
    assert {entry["last_phase"] for entry in report.layers if entry["layer"] != 1} == {"sparse"}
    assert {entry["last_phase"] for entry in report.layers if entry["layer"] == 1} == {"dense"}
    processor.reset()
    assert processor.bindings[0].run.shared == {}
    assert processor.report().notes == report.notes


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0},
        {"sparsity": True},
        {"ramp": -0.1},
        {"mask": "band"},
        {"warmup": 1.5},
        {"warmup": -1},
        {"warmup": True},
        {"period": 0},
        {"period": 2.0},
        {"block": 32},
        {"tile": (4, 4)},
        {"precision": "int4"},
        {"budget_gb": -1},
        {"layers": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rettention(**wrong)
