"""Compensated delta without weights."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dit_sparse.methods.block_scores import error_scores, pooled_softmax
from dit_sparse.methods.compensated_delta import CompensatedDelta, log_fade, log_snr
from dit_sparse.methods.head_budget import compensation_size, level_counts, spread
from dit_sparse.schedule import Phase

UNITS = ["rows", "heads", "all", "never"]
SUMMARIES = ["drop", "centroid", "first_order"]


def run(method: CompensatedDelta, calls: list[Any]) -> list[torch.Tensor]:
    """Outputs of consecutive steps that share a memory."""
    memory: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    out = []
    for index, data in enumerate(calls):
        call = data.call(index, memory)
        call.shared = shared
        out.append(method.attend(call))
    return out


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("summary", SUMMARIES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("text", "order"), [(0, "video_text"), (11, "text_video")])
def test_frozen_inputs_give_dense_attention(
    make: Any, unit: str, summary: str, density: float, text: int, order: str
) -> None:
    data = make(grid=(3, 9, 13), text=text, order=order)
    method = CompensatedDelta(density, 3, unit, 1, summary)
    for out in run(method, [data] * 6):
        assert (out - data.attention()).abs().max() < 1e-12


@pytest.mark.parametrize("block", [(128, 64), (64, 128)])
@pytest.mark.parametrize("selection", ["mass", "pooled", "error"])
def test_query_and_key_blocks_may_differ(make: Any, selection: str, block: tuple[int, int]) -> None:
    data = make(grid=(3, 9, 13), text=11, order="text_video")
    method = CompensatedDelta(
        0.4, 2, "rows", 1, selection=selection, block=block, mask_period=1, theta=1.0
    )
    memory: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for index in range(4):
        call = data.call(index, memory)
        call.shared = shared
        assert (method.attend(call) - data.attention()).abs().max() < 1e-12
    mask = memory["mask"]
    assert mask.block == block
    kept = mask.dense()[..., : 351 // block[0], : 351 // block[1]].sum(-1)
    assert (kept == max(1, round(0.4 * (351 // block[1])))).all()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("extrapolate", [False, True])
def test_full_density_is_dense_at_every_step(make: Any, unit: str, extrapolate: bool) -> None:
    calls = [make(grid=(3, 9, 13), text=5, seed=seed) for seed in range(6)]
    method = CompensatedDelta(1.0, 3, unit, 1, extrapolate=extrapolate, adapt=False)
    for data, out in zip(calls, run(method, calls), strict=True):
        assert (out - data.attention()).abs().max() < 1e-12


def test_a_row_is_dense_at_its_turn_and_moved_by_the_sparse_change_after(make: Any) -> None:
    calls = [make(grid=(4, 8, 12), seed=seed) for seed in range(4)]
    method = CompensatedDelta(0.3, 3, "rows", 1, "centroid", tile=None)
    memory: dict[str, Any] = {}
    sparse = []
    out = []
    for index, data in enumerate(calls):
        call = data.call(index, memory)
        out.append(method.attend(call))
        sparse.append(call.attention(memory["mask"], call.summarize(64)).out)
    # Rows of blocks 1 and 4 have their turn at step 1; their masks do not change until step 4.
    rows = torch.cat([torch.arange(64, 128), torch.arange(256, 320)])
    dense = calls[1].attention()[:, rows]
    assert (out[1][:, rows] - dense).abs().max() < 1e-12
    for index in (2, 3):
        moved = dense + sparse[index][:, rows] - sparse[1][:, rows]
        assert (out[index][:, rows] - moved).abs().max() < 1e-12
    others = torch.arange(0, 64)
    assert (out[1] - calls[1].attention())[:, others].abs().max() > 1e-3


def test_without_compute_the_last_refresh_is_reused(make: Any) -> None:
    calls = [make(grid=(4, 8, 12), seed=seed) for seed in range(4)]
    out = run(CompensatedDelta(0.0, 3, "all", 1, "drop"), calls)
    dense = [data.attention() for data in calls]
    for index, source in enumerate((0, 0, 0, 3)):
        assert torch.allclose(out[index], dense[source], atol=1e-12)


def test_log_fade_is_the_share_that_holds() -> None:
    old = torch.randn(2, 50, 3, 8, dtype=torch.float64)
    factor = torch.tensor([1.0, 0.5, -2.0], dtype=torch.float64).view(1, 1, 3, 1)
    found = log_fade(old, factor * old).flatten()
    torch.testing.assert_close(found.exp(), torch.tensor([1.0, 0.5, 1e-3]).double())


@pytest.mark.parametrize("unit", ["rows", "heads", "all"])
def test_residuals_that_turn_out_worthless_fade_away(make: Any, unit: str) -> None:
    """Independent inputs in every step: what is remembered explains nothing and must not stay."""
    calls = [make(grid=(4, 8, 12), seed=seed, heads=3) for seed in range(8)]
    error = {}
    for fade in (False, True):
        out = run(CompensatedDelta(0.3, 3, unit, 1, fade=fade), calls)
        error[fade] = sum(float((out[i] - calls[i].attention()).norm()) for i in range(5, 8))
    assert error[True] < 0.95 * error[False]


def test_the_weight_of_a_residual_follows_its_age(make: Any) -> None:
    calls = [make(grid=(4, 8, 12), seed=seed) for seed in range(4)]
    memory: dict[str, Any] = {}
    method = CompensatedDelta(0.3, 4, "rows", 1, fade=True, tile=None)
    for index, data in enumerate(calls):
        call = data.call(index, memory)
        out = method.attend(call)
    sparse = call.attention(memory["mask"], call.summarize(64, first_order=True)).out
    # Block b of six had its turn at step b if b < 4, else at step b - 4.
    last = torch.tensor([0, 1, 2, 3, 0, 1]).repeat_interleave(64)
    weight = ((3 - last).view(1, -1, 1, 1) * memory["fade"]).exp()
    torch.testing.assert_close(out, sparse + weight * memory["residual0"].values)
    assert (memory["fade"] < -0.01).all()


def test_nothing_fades_where_nothing_moves(make: Any) -> None:
    data, memory = make(grid=(4, 8, 12)), {}
    for index in range(3):
        CompensatedDelta(0.3, 4, "rows", 1, fade=True).attend(data.call(index, memory))
    assert memory["fade"].abs().max() < 1e-12


def test_extrapolation_continues_a_straight_line(make: Any) -> None:
    """Values that move by the same amount every step are predicted exactly without compute."""
    start, change = make(grid=(4, 8, 12), seed=0), make(grid=(4, 8, 12), seed=1)
    calls = []
    for step in range(6):
        data = make(grid=(4, 8, 12), seed=0)
        data.v = start.v + step * change.v
        calls.append(data)
    method = CompensatedDelta(0.0, 2, "all", 1, "drop", extrapolate=True, adapt=False)
    out = run(method, calls)
    assert (out[3] - calls[3].attention()).abs().max() < 1e-12
    assert (out[5] - calls[5].attention()).abs().max() < 1e-12
    plain = run(CompensatedDelta(0.0, 2, "all", 1, "drop"), calls)
    assert (plain[3] - calls[3].attention()).abs().max() > 1e-2


def test_compensation_brings_the_sparse_output_closer(make: Any) -> None:
    data = make(grid=(8, 8, 16), sharp=1.0)
    error = {}
    for summary in SUMMARIES:
        method = CompensatedDelta(0.1, 1, "never", 1, summary, delta=False)
        out = run(method, [data, data])[1]
        error[summary] = float((out - data.attention()).norm())
    assert error["first_order"] < error["centroid"] < 0.7 * error["drop"]


def test_phases_density_and_memory(make: Any) -> None:
    data = make(grid=(8, 8, 16))
    memory: dict[str, Any] = {}
    method = CompensatedDelta(0.125, 4, "rows", warmup=3)
    seen = []
    for index in range(5):
        call = data.call(index, memory)
        method.attend(call)
        seen.append((call.phase, call.head_density))
        assert ("mask" in memory) is (index >= 2)
    phases = [phase for phase, _ in seen]
    assert phases == [Phase.DENSE, Phase.DENSE, Phase.SEARCH, Phase.SPARSE, Phase.SPARSE]
    assert seen[-1][1].tolist() == [[0.125 + 0.25] * 2]
    assert set(memory) == {"turn", "mask", "count", "longest", "density", "residual0"}
    assert memory["residual0"].values.shape == data.q.shape


@pytest.mark.parametrize("unit", UNITS)
def test_residuals_in_host_memory_are_the_same(make: Any, unit: str) -> None:
    calls = [make(grid=(3, 9, 13), text=5, seed=seed) for seed in range(6)]
    here = run(CompensatedDelta(0.3, 3, unit, 1), calls)
    there = run(CompensatedDelta(0.3, 3, unit, 1, offload=True), calls)
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("unit", UNITS)
def test_residuals_in_eight_bits_are_close(make: Any, unit: str) -> None:
    calls = [make(grid=(3, 9, 13), seed=seed, dtype=torch.float32) for seed in range(6)]
    exact = run(CompensatedDelta(0.3, 3, unit, 1), calls)
    rounded = run(CompensatedDelta(0.3, 3, unit, 1, precision="float8"), calls)
    plain = run(CompensatedDelta(0.3, 3, unit, 1, delta=False), calls)
    for index in range(1, 6):
        error = (rounded[index] - exact[index]).norm()
        assert error < 0.1 * (plain[index] - exact[index]).norm() or error < 1e-5


def test_layers_without_a_residual_run_without(make: Any) -> None:
    calls = [make(grid=(3, 9, 13), seed=seed) for seed in range(3)]
    method = CompensatedDelta(0.3, 3, "rows", 1, layers=(1,))
    plain = CompensatedDelta(0.3, 3, "rows", 1, delta=False)
    memories: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for index, data in enumerate(calls):
        ours, theirs = (data.call(index, memory) for memory in memories)
        ours.layers = 2
        assert torch.equal(method.attend(ours), plain.attend(theirs))
    assert "residual0" not in memories[0]


def test_the_residual_is_dropped_in_the_last_step(make: Any) -> None:
    data, memory = make(), {}
    for index in range(4):
        CompensatedDelta(0.5, 2, "rows", 1).attend(data.call(index, memory, total=4))
        assert ("residual0" in memory) is (index < 3)


def test_a_budget_that_is_too_small_is_refused_at_the_first_step(make: Any) -> None:
    with pytest.raises(ValueError, match=r"expected the residual to take at most 0\.00 GB"):
        CompensatedDelta(budget_gb=0.0, adapt=False).attend(make().call())


def test_warmup_as_a_share(make: Any) -> None:
    data = make()
    phases = []
    memory: dict[str, Any] = {}
    for index in range(4):
        call = data.call(index, memory, total=10)
        CompensatedDelta(0.5, warmup=0.3).attend(call)
        phases.append(call.phase)
    assert phases == [Phase.DENSE, Phase.DENSE, Phase.SEARCH, Phase.SPARSE]


def test_warmup_where_nothing_tells_the_number_of_steps(make: Any) -> None:
    data = make()
    phases = []
    memory: dict[str, Any] = {}
    for index in range(4):
        call = data.call(index, memory, total=10)
        call.step = replace(call.step, total=None)
        CompensatedDelta(0.5, warmup=0.15).attend(call)
        phases.append(call.phase)
    assert phases == [Phase.DENSE, Phase.DENSE, Phase.SEARCH, Phase.SPARSE]


@pytest.mark.parametrize("selection", ["mass", "pooled", "error"])
@pytest.mark.parametrize("unit", UNITS)
def test_padding_is_never_read(make: Any, selection: str, unit: str) -> None:
    calls = []
    for seed in range(4):
        data = make(grid=(3, 9, 13), text=70, batch=2, seed=seed)
        data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
        data.key_valid[1, -33:] = False
        data.k[1, -33:], data.v[1, -33:] = float("nan"), float("nan")
        calls.append(data)
    method = CompensatedDelta(0.2, 3, unit, 1, selection=selection)
    assert not any(out.isnan().any() for out in run(method, calls))
    text = slice(calls[0].layout.video, None)
    for data, out in zip(calls, run(method, calls), strict=True):
        assert (out[:, text] - data.attention()[:, text]).abs().max() < 1e-12


def test_pooled_softmax(make: Any) -> None:
    data = make(grid=(3, 9, 13), heads=1, dtype=torch.float32)
    call = data.call()
    scores = pooled_softmax(call, call.summarize(64), 64)
    assert scores.shape == (1, 1, 6, 6)
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 1, 6))
    mean_k = data.k[0, 320:, 0].mean(0)
    first = data.q[0, :64, 0].mean(0)
    ratio = scores[0, 0, 0, 5] / scores[0, 0, 0, 0]
    expected = (first @ (mean_k - data.k[0, :64, 0].mean(0)) * 8**-0.5).exp() * 31 / 64
    torch.testing.assert_close(ratio, expected)


@pytest.mark.parametrize("text", [0, 40])
def test_error_scores(make: Any, text: int) -> None:
    """Against the definition, one pair of blocks at a time; padding and text count nothing."""
    data = make(grid=(3, 9, 13), text=text, heads=2, sharp=1.0)
    data.key_valid = torch.ones(1, data.layout.tokens, dtype=torch.bool)
    data.key_valid[0, 70:90] = False
    data.k[0, 70:90] = data.v[0, 70:90] = float("nan")
    call = data.call()
    scores = error_scores(call, call.summarize(64), 64)
    video = 5 if text else 6
    expected = torch.zeros(2, len(scores[0, 0]), video).double()
    for head in range(2):
        for p in range(len(scores[0, 0])):
            query = data.q[0, 64 * p : 64 * p + 64, head].mean(0) * 8**-0.5
            for j in range(video):
                place = torch.arange(64 * j, min(64 * j + 64, 351))
                place = place[data.key_valid[0, place]]
                k, v = data.k[0, place, head], data.v[0, place, head]
                exact = (k @ query).exp()[:, None] * v
                mean = (k.mean(0) @ query).exp() * v.mean(0)
                expected[head, p, j] = (exact - mean).square().sum()
    expected /= expected.amax(-1, keepdim=True)
    torch.testing.assert_close(scores[0, ..., :video], expected)
    assert not scores[..., video:].any()


def test_what_means_represent_has_no_error(make: Any) -> None:
    data = make(grid=(4, 8, 12), heads=1)
    for x in (data.k, data.v):
        x[:, :64] = x[:, :1].clone()
    call = data.call()
    scores = error_scores(call, call.summarize(64), 64)
    assert scores[..., 0].max() < 1e-12 and scores[..., 1:].max() > 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 1.5},
        {"density": True},
        {"period": 0},
        {"period": 0.0},
        {"period": 0.5, "fade": True},
        {"mask_period": 1.5},
        {"mask_period": 0},
        {"theta": 0.0},
        {"refresh": "columns"},
        {"summary": "second_order"},
        {"selection": "random"},
        {"warmup": 0},
        {"warmup": 1.5},
        {"block": 32},
        {"extrapolate": True, "offload": True, "adapt": False},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CompensatedDelta(**wrong)


def sequence(
    method: CompensatedDelta, calls: list[Any], total: int | None = None, indices: Any = None
) -> list[tuple[torch.Tensor, Any]]:
    """Outputs and calls; ``indices`` are the steps that run, where a cache skips others."""
    memory: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    done = []
    for data, index in zip(calls, indices or range(len(calls)), strict=True):
        call = data.call(index, memory, total=total or len(calls))
        call.shared = shared
        done.append((method.attend(call), call))
    return done


@pytest.mark.parametrize(("total", "turns"), [(9, False), (19, False), (20, True), (30, True)])
def test_auto_rotates_where_two_periods_follow_the_warmup(
    make: Any, total: int, turns: bool
) -> None:
    """20 steps: four warm up, sixteen follow."""
    calls = [make(grid=(4, 8, 16), seed=seed) for seed in range(total)]
    auto = sequence(CompensatedDelta(0.25, 8), calls)
    other = CompensatedDelta(0.25, 8, "rows") if turns else CompensatedDelta(0.375, 8, "never")
    for (a, _), (b, _) in zip(auto, sequence(other, calls), strict=True):
        assert torch.equal(a, b)
    call = auto[-1][1]
    # The share of dense rows and the blocks instead cost the same.
    assert call.head_density.tolist() == [[0.375] * 2]
    assert call.phase is Phase.SPARSE


def test_masks_live_longer_than_residuals(make: Any) -> None:
    calls = [make(grid=(4, 8, 12), seed=seed) for seed in range(10)]
    memory: dict[str, Any] = {}
    method = CompensatedDelta(0.3, 3, "rows", 1, mask_period=2)
    masks, residuals = [], []
    for index, data in enumerate(calls):
        method.attend(data.call(index, memory, total=20))
        masks.append(memory["mask"].bits.clone())
        residuals.append(memory["residual0"].values.clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(masks)]
    # Turns 1 to 3 are the first refreshes of the rows, 4 to 6 the second, and so on.
    assert changed == [False] * 3 + [True] * 3 + [False] * 3
    assert not any(torch.equal(a, b) for a, b in pairwise(residuals))


def test_log_snr() -> None:
    assert log_snr(0.5) == 0
    assert log_snr(0.75) == pytest.approx(math.log(3))
    assert log_snr(0.25) == pytest.approx(-math.log(3))
    assert log_snr(0.0) == log_snr(0.01) == pytest.approx(-log_snr(1.0))


def test_a_period_in_noise_levels_goes_as_far_as_the_steps(make: Any) -> None:
    """Equal steps of log SNR by a quarter of the period take two of eight turns each."""
    data, memory = make(grid=(4, 8, 16)), {}
    method = CompensatedDelta(0.25, 2.0, "rows", 1)
    turns, densities = [], []
    for index in range(7):
        call = data.call(index, memory)
        level = 0.5 * index - 1.5 + 1e-6
        call.step = replace(call.step, progress=1 / (1 + math.exp(-level)))
        method.attend(call)
        turns.append(memory["turn"])
        densities.append(call.head_density)
    assert turns == [0, 2, 4, 6, 8, 10, 12]
    assert densities[-1].tolist() == [[0.5] * 2]
    # A jump of more than a period refreshes everything, with the model's own output.
    call = data.call(7, memory)
    call.step = replace(call.step, progress=0.99)
    assert torch.equal(method.attend(call), data.attention()) and call.phase is Phase.SEARCH


@pytest.mark.parametrize("period", [3, 1.5])
@pytest.mark.parametrize("unit", ["rows", "heads", "all"])
def test_what_falls_into_skipped_steps_is_made_up_for(
    make: Any, unit: str, period: int | float
) -> None:
    """Skipped steps delay a refresh, they never lose it: between two of a row are few calls."""
    calls = [make(grid=(4, 8, 12), seed=seed, heads=3) for seed in range(12)]
    indices = [0, 1, 2, 6, 7, 11, 12, 13, 20, 21, 22, 30]
    method = CompensatedDelta(0.3, period, unit, 1)
    memory: dict[str, Any] = {}
    last = torch.zeros(calls[0].q.shape[:3])
    before = None
    for number, (data, index) in enumerate(zip(calls, indices, strict=True)):
        call = data.call(index, memory, total=40)
        call.step = replace(call.step, progress=0.02 + 0.03 * index)
        method.attend(call)
        kept = memory["residual0"].values.clone()
        if before is not None:
            last[(kept != before).any(-1)] = number
        before = kept
        if isinstance(period, int):
            assert number - last.min() < period
    assert last.min() > 6


def test_theta_refreshes_a_layer_after_a_jump_in_the_values_alone(make: Any) -> None:
    still, memory = make(grid=(4, 8, 12)), {}
    jumped = make(grid=(4, 8, 12))
    jumped.v = make(grid=(4, 8, 12), seed=1).v
    method = CompensatedDelta(0.3, 8, "rows", 1, theta=0.5)
    phases, outs = [], []
    for index, data in enumerate([still, still, still, jumped, jumped, jumped, jumped]):
        call = data.call(index, memory)
        outs.append(method.attend(call))
        phases.append(call.phase.value)
    assert phases == ["search", *["sparse"] * 3, "search", "sparse", "sparse"]
    # The step of the jump is wrong, the next one is the model's own, and from there on it holds.
    error = [float((out - jumped.attention()).abs().max()) for out in outs[3:]]
    assert error[0] > 0.1 and max(error[1:]) < 1e-12


@pytest.mark.parametrize("unit", ["rows", "heads"])
def test_drift_is_measured_from_each_rows_own_refresh(make: Any, unit: str) -> None:
    calls = [make(grid=(4, 8, 12), text=5, seed=seed, heads=3) for seed in range(4)]
    memory: dict[str, Any] = {}
    method = CompensatedDelta(0.3, 3, unit, 1, "centroid", tile=None, theta=100.0)
    reference = torch.zeros(1, 6, 3, 8).double()
    for index, data in enumerate(calls):
        call = data.call(index, memory)
        method.attend(call)
        sparse = call.attention(memory["mask"], call.summarize(64)).out[:, :384:64]
        if unit == "rows":
            which = (slice(None), slice(None) if index == 0 else slice(index % 3, None, 3))
        else:
            which = (
                slice(None),
                slice(None),
                slice(None) if index == 0 else slice(index % 3, None, 3),
            )
        reference[which] = sparse[which]
        if index:
            moved = (sparse - reference).square().sum((0, 1, 3))
            expected = (moved / reference.square().sum((0, 1, 3))).median().sqrt()
            assert memory["drift"].read() == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(memory["reference"], reference)


def test_layers_of_text_alone_do_not_drift(make: Any) -> None:
    data, memory = make(grid=(1, 4, 4), text=30), {}
    for index in range(3):
        out = CompensatedDelta(0.3, 8, "rows", 1, theta=0.1).attend(data.call(index, memory))
        assert (out - data.attention()).abs().max() < 1e-12


@pytest.mark.parametrize("unit", ["rows", "heads", "never"])
def test_heads_that_need_their_summaries_keep_more(make: Any, unit: str) -> None:
    """One head attends broadly, one narrowly, one in between; the mean density is as asked."""
    calls = []
    for seed in range(5):
        data = make(grid=(8, 8, 16), heads=3, sharp=1.0, seed=seed)
        data.q *= torch.tensor([0.3, 9.0, 2.0]).double().view(1, 1, 3, 1)
        calls.append(data)
    plain = sequence(CompensatedDelta(0.25, 4, unit, 1, delta=False), calls)
    done = sequence(CompensatedDelta(0.25, 4, unit, 1, delta=False, head_adaptive=True), calls)
    assert done[-1][1].memory["count"].tolist() == [[6, 2, 4]]
    for (_, call), (_, even) in zip(done[1:], plain[1:], strict=True):
        kept = call.memory["mask"].dense().sum(-1).float()
        assert torch.equal(kept, torch.tensor([6.0, 2.0, 4.0])[None, :, None].expand_as(kept))
        assert call.head_density.mean() == even.head_density.mean()


@pytest.mark.parametrize(("count", "blocks"), [(1, 40), (2, 3), (3, 3), (5, 40), (39, 40)])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_levels_keep_the_mean(count: int, blocks: int, heads: int) -> None:
    size = torch.rand(2, heads, generator=torch.Generator().manual_seed(0))
    counts = level_counts(size, count, blocks)
    assert counts.double().mean(-1).tolist() == [count] * 2
    assert counts.min() >= 1 and counts.max() <= min(blocks, count + spread(count, blocks))
    if heads >= 3 and 1 < count < blocks:
        assert counts.gather(1, size.argmax(-1, keepdim=True)).min() > count


def test_compensation_size_is_zero_where_nothing_is_skipped(make: Any) -> None:
    data = make(grid=(4, 8, 12))
    call = data.call()
    means = call.summarize(64, first_order=True)
    for keep, expected in ((6, 0.0), (2, 0.05)):
        mask = call.top_blocks(torch.rand(1, 2, 6, 6), torch.full((1, 1), keep), 64).mask
        size = compensation_size(call.attention(mask, means).out, call.attention(mask).out)
        assert size.shape == (1, 2)
        assert (size < 1e-6).all() if keep == 6 else (size > expected).all()
