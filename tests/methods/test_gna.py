"""GNA without weights: what it computes, when, in which order, and what it plans."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_neighborhood import axis
from test_neighborhood_mask import visible_pairs

from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenLayout
from dit_sparse.methods import gna_plan
from dit_sparse.methods.base import Call
from dit_sparse.methods.gna import GNA
from dit_sparse.methods.gna_plan import best_tile, propose, visited_share
from dit_sparse.neighborhood import Neighborhood
from dit_sparse.neighborhood_mask import arrange
from dit_sparse.schedule import Phase, Step

TEXTS = [(text, order) for text in (0, 1, 5, 226, 256) for order in ("video_text", "text_video")]
SETTINGS = [
    GNA(window=(3, 5, 7), warmup=0, block=64),
    GNA(window=(-1, 4, 8), stride=(1, 4, 4), warmup=0, block=64),
    GNA(window=(2, 3, 5), dilation=(1, 2, 3), warmup=0, tile=(2, 2, 4)),
    GNA(window=(3, -1, 6), causal=(True, False, False), warmup=0),
    GNA(window=0.4, warmup=0, block=64),
]


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS, ids=str)
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_output_is_softmax_over_window_and_text(
    make: Any, method: GNA, text: int, order: str
) -> None:
    data = make(grid=(4, 8, 17), text=text, order=order, batch=2)
    call = data.call()
    out = method.attend(call)
    keep = visible_pairs(data.layout, method.plan(data.layout).neighborhood)
    assert not keep.all()
    assert (out - data.attention(keep)).abs().max() < 1e-10
    assert (out - data.attention()).abs().max() > 1e-4
    assert call.phase is Phase.SPARSE
    torch.testing.assert_close(call.head_density, keep.double().mean().float().view(1, 1))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(axis(4), axis(9), axis(9)),
    st.sampled_from([(0, 0), (1, 0), (0, 11), (4, 3)]),
    st.booleans(),
)
def test_any_grid(axes: Any, text: tuple[int, int], automatic: bool) -> None:
    grid, window, stride, dilation, causal = zip(*axes, strict=True)
    layout = TokenLayout.around(grid, *text)
    tile = None if automatic else tuple(max(1, n // 2) for n in grid)
    method = GNA(window, stride, dilation, causal, tile, 64, 0)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, layout.tokens, 2, 8, generator=rng, dtype=torch.float64) for _ in range(3)
    )
    step = Step(0, 1, 0.0, "cond", 0)
    call = Call(q, k, v, layout, step, 0, 1, None, {}, None, "auto", lambda lse: (q, None))
    keep = visible_pairs(layout, Neighborhood.on(grid, window, stride, dilation, causal))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    weights = scores.masked_fill(~keep, float("-inf")).softmax(-1)
    expected = torch.einsum("bhij,bjhd->bihd", weights, v)
    assert (method.attend(call) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("order", ["video_text", "text_video"])
def test_padding_is_never_read(make: Any, order: str) -> None:
    data = make(text=21, order=order, batch=2)
    data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
    end = data.layout.text if order == "text_video" else data.layout.tokens
    data.key_valid[0, end - 9 : end] = False
    padding = ~data.key_valid
    method, outs = GNA(window=(3, 4, 6), warmup=0), []
    for poison in (0.0, 50.0, float("nan")):
        data.k[padding] = data.v[padding] = poison
        outs.append(method.attend(data.call()))
    keep = visible_pairs(data.layout, method.plan(data.layout).neighborhood)
    assert (outs[0] - data.attention(keep)).abs().max() < 1e-10
    assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])


def test_full_windows_are_dense_attention_whatever_the_order(make: Any) -> None:
    for tile in (None, (1, 1, 1), (2, 3, 5)):
        for text, order in ((0, "video_text"), (7, "text_video")):
            data = make(grid=(3, 6, 10), text=text, order=order)
            call = data.call()
            method = GNA(window=-1, warmup=0, tile=tile)
            assert (method.attend(call) - data.attention()).abs().max() < 1e-12
            assert float(call.head_density) == 1.0
            assert call.memory["mask"].partial is None


def test_summaries_bring_the_output_closer_to_dense(make: Any) -> None:
    # Smooth keys and values, so that means say something about their blocks.
    data = make(grid=(4, 8, 16), sharp=1.0)
    coords = data.layout.coords().double()
    waves = torch.stack([(coords @ w).sin() for w in torch.randn(8, 3).double() * 0.3], -1)
    data.k = data.k * 0.1 + waves[None, :, None]
    data.v = data.v * 0.1 + waves.flip(-1)[None, :, None]
    errors = {}
    for summary in ("drop", "centroid", "first_order"):
        method = GNA(window=(-1, 4, 4), stride=(1, 2, 4), warmup=0, block=64, summary=summary)
        call = data.call()
        errors[summary] = float((method.attend(call) - data.attention()).norm())
        assert call.memory["mask"].visited.density() < 0.7
    assert errors["centroid"] < 0.6 * errors["drop"]
    assert errors["first_order"] < errors["drop"]
    full = GNA(window=-1, warmup=0, block=64, summary="first_order")
    assert (full.attend(data.call()) - data.attention()).abs().max() < 1e-10


# --- the hot path --------------------------------------------------------------------------------


def test_a_block_sparse_setting_never_computes_the_rule(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_sparse.kernels import ops
    from dit_sparse.neighborhood_mask import NeighborhoodMask

    def refuse(*args: Any) -> None:
        raise AssertionError("the rule was computed")

    monkeypatch.setattr(NeighborhoodMask, "visible", refuse)
    asked: list[str] = []
    select = ops.select
    monkeypatch.setattr(ops, "select", lambda op, *a: asked.append(op) or select(op, *a))
    data = make(grid=(4, 8, 16), text=64)
    call = data.call()
    GNA(window=(-1, -1, 12), stride=(1, 1, 4), warmup=0, block=64).attend(call)
    assert "attention" in asked and "neighborhood" not in asked
    # The same windows one by one do need it.
    with pytest.raises(AssertionError, match="rule"):
        GNA(window=(-1, -1, 12), warmup=0, block=64).attend(data.call())


def test_mask_and_order_are_made_once_for_all_layers_and_steps(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(grid=(4, 8, 12), text=3)
    method = GNA(window=(3, 5, 5), warmup=0)
    memories: list[dict[str, Any]] = [{}, {}]
    method.attend(data.call(0, memories[0]))
    monkeypatch.setattr(torch, "argsort", None)
    monkeypatch.setattr(gna_plan, "visited_share", None)
    made = arrange.cache_info().misses
    for index in range(1, 4):
        for memory in memories:
            method.attend(data.call(index, memory))
    assert arrange.cache_info().misses == made
    # One object, so that the report counts its bytes once.
    assert memories[0]["mask"] is memories[1]["mask"]


def test_the_report_names_the_kernels_of_both_parts(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(grid=(2, 8, 16))
    both, call = GNA(window=(-1, -1, 11), warmup=0, block=64, tile=(2, 8, 4)), data.call()
    both.attend(call)
    mask = call.memory["mask"]
    assert mask.full is not None and mask.partial is not None
    assert call.kernel == "cpu"
    from dit_sparse.kernels.cpu_neighborhood import CpuNeighborhood

    monkeypatch.setattr(CpuNeighborhood, "reasons", lambda self, call: ["no"])
    both.attend(call)
    assert call.kernel == "cpu+reference"


# --- schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "total", "dense"),
    [(0, 10, 0), (3, 10, 3), (0.3, 10, 3), (0.3, 50, 15), (12, 35, 12), (1.0, 4, 4), (0.3, 4, 1)],
)
def test_warm_up(make: Any, warmup: float, total: int, dense: int) -> None:
    data = make(grid=(2, 4, 9))
    method, sentinel = GNA(window=(1, 3, 3), warmup=warmup), torch.empty(0)
    for index in range(total):
        call = data.call(index, total=total)
        call.dense_attention = lambda with_lse: (sentinel, None)
        assert (method.attend(call) is sentinel) is (index < dense)
        assert call.phase is (Phase.DENSE if index < dense else Phase.SPARSE)


@pytest.mark.parametrize(("progress", "dense"), [(0.0, True), (0.29, True), (0.31, False)])
def test_warm_up_by_noise_where_nobody_tells_the_steps(
    make: Any, progress: float, dense: bool
) -> None:
    call = make(grid=(2, 4, 9)).call()
    call.step = Step(7, None, progress, "cond", 0)
    GNA(window=(1, 3, 3), warmup=0.3).attend(call)
    assert (call.phase is Phase.DENSE) is dense


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1.5}, "float is a density"),
        ({"window": 0.0}, "float is a density"),
        ({"window": 0.3, "stride": 2}, "stride is chosen too"),
        ({"window": 0.3, "dilation": 2}, "dilation is chosen too"),
        ({"window": 0.3, "causal": True}, "causal is chosen too"),
        ({"window": 0}, "window must be at least 1 or -1"),
        ({"window": (3, 3)}, "window must be one int, or three"),
        ({"window": 3, "stride": 0}, "stride must be at least 1"),
        ({"window": 3, "dilation": (1, 0, 1)}, "dilation must be at least 1"),
        ({"window": 3, "causal": 1}, "causal must be one bool"),
        ({"tile": 4}, "tile must be"),
        ({"tile": (4, 0, 4)}, "tile must be at least 1"),
        ({"block": 32}, "block must be 64 or 128"),
        ({"warmup": -1}, "warmup must be"),
        ({"warmup": 1.5}, "warmup must be"),
        ({"warmup": True}, "warmup must be"),
        ({"summary": "mean"}, "summary must be one of"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GNA(**options)


def test_windows_that_do_not_fit_the_grid_are_named(make: Any) -> None:
    with pytest.raises(ValueError, match=r"window along frames must be in 1\.\.2"):
        GNA(window=(18, 4, 4), warmup=0).attend(make(grid=(2, 4, 9)).call())
    with pytest.raises(ValueError, match="stride along width must be at most the window"):
        GNA(window=3, stride=(1, 1, 4), warmup=0).attend(make(grid=(3, 4, 9)).call())


@pytest.mark.parametrize("method", SETTINGS, ids=str)
def test_settings_survive_json(method: GNA) -> None:
    data = json.loads(json.dumps(SparseConfig(method).to_dict()))
    assert SparseConfig.from_dict(data).method == method


# --- planning ------------------------------------------------------------------------------------

GRIDS = [(33, 45, 80), (21, 45, 80), (21, 30, 52), (13, 30, 45), (11, 48, 85), (1, 128, 72)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.15, 0.3, 0.5])
def test_plans_keep_what_was_asked_and_waste_little(grid: Any, density: float) -> None:
    plan = propose(grid, density, 64)[0]
    neighborhood = plan.neighborhood
    assert abs(math.log(neighborhood.density() / density)) < math.log(1.25)
    mask = arrange.__wrapped__(
        TokenLayout(grid), neighborhood, plan.tile, 64, torch.device("cpu")
    ).mask
    computed = mask.visited.density()
    assert computed < 1.35 * neighborhood.density()
    assert computed <= plan.estimate * 1.01 < 1.15 * computed
    for size, step, n in zip(neighborhood.window, neighborhood.stride, grid, strict=True):
        assert size == n or size >= 3 * step


@pytest.mark.parametrize(
    ("grid", "block"), [((30, 48, 80), 128), ((1, 256, 256), 128), ((16, 32, 32), 64)], ids=str
)
def test_plans_on_even_grids_are_block_sparse(grid: Any, block: int) -> None:
    plan = propose(grid, 0.3, block)[0]
    mask = arrange.__wrapped__(
        TokenLayout(grid), plan.neighborhood, plan.tile, block, torch.device("cpu")
    ).mask
    assert mask.partial is None


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid[0] > 1], ids=str)
def test_plans_keep_all_frames_and_the_shape_of_the_picture(grid: Any) -> None:
    for density in (0.1, 0.3, 0.5):
        frames, height, width = propose(grid, density, 64)[0].neighborhood.window
        assert frames == grid[0]
        assert 0.6 < (height / grid[1]) / (width / grid[2]) < 1.6


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 5), (2, 3, 5), (1, 9, 9), (8, 16, 16)])
def test_small_grids_get_the_nearest_density(grid: Any) -> None:
    for density in (0.1, 0.5, 0.9):
        plans = propose(grid, density, 128)
        assert plans and all(p.neighborhood.grid == grid for p in plans)
        assert len({p.neighborhood.window for p in plans}) == len(plans)


@pytest.mark.parametrize("density", [0.0, 1.0, -1.0, float("nan")])
def test_impossible_densities(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\)"):
        propose((4, 8, 8), density)


@settings(max_examples=40, deadline=None)
@given(st.tuples(axis(6), axis(12), axis(16)), st.sampled_from([16, 32]), st.integers(0, 2**16))
def test_the_estimate_is_exact_for_tiles_of_whole_blocks(axes: Any, block: int, seed: int) -> None:
    """One axis after another: tiles that no border cuts cost what the mask visits."""
    rng = torch.Generator().manual_seed(seed)
    tile = {16: [(1, 4, 4), (2, 2, 4)], 32: [(2, 4, 4), (1, 4, 8)]}[block][seed % 2]
    grid = tuple(t * int(torch.randint(1, 4, (1,), generator=rng)) for t in tile)
    window = tuple(min(n, a[1]) for n, a in zip(grid, axes, strict=True))
    stride = tuple(min(w, a[2]) for w, a in zip(window, axes, strict=True))
    neighborhood = Neighborhood.on(grid, window, stride)
    mask = arrange.__wrapped__(
        TokenLayout(grid), neighborhood, tile, block, torch.device("cpu")
    ).mask
    assert visited_share(neighborhood, tile, block) == pytest.approx(mask.visited.density())


def test_best_tile_prefers_groups_of_queries_on_ragged_grids() -> None:
    neighborhood = Neighborhood.on((33, 45, 80), (33, 27, 48), (1, 9, 16))
    assert best_tile(neighborhood, 128) == (33, 9, 16)
    published = Neighborhood.on((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert best_tile(published, 128) == (2, 8, 8)
    assert best_tile(Neighborhood.on((2, 3, 5), 2), 64) == (2, 3, 5)


def test_a_budget_chooses_windows_anew() -> None:
    method = GNA((3, 8, 8), stride=2, causal=True)
    assert method.at_budget(0.25) == GNA(0.25)
    assert method.at_budget(1.0) == GNA(-1)
