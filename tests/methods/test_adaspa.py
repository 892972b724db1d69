"""AdaSpa without weights: the search, the budget, the caches and the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse.layout import TokenLayout
from dit_sparse.mask import PackedMask, block_count, block_sides, block_sizes
from dit_sparse.methods.adaspa import (
    ROW_STRIDES,
    AdaSpa,
    head_levels,
    kept_blocks,
    row_mass_drift,
)
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.processors.run import Run
from dit_sparse.schedule import Phase

# One search in step 0, a refresh in step 2.
SEARCH = (0, 3)
TEXTS = [(text, order) for text in (0, 1, 5, 226) for order in ("video_text", "text_video")]


def found(method: AdaSpa, data: Any, memory: dict[str, Any] | None = None) -> PackedMask:
    """The mask that the first step finds."""
    memory = {} if memory is None else memory
    method.attend(data.call(0, memory))
    return memory["mask"]


@pytest.fixture
def lse_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every pass that computes LSE."""
    passes: list[int] = []
    original = Call.row_lse

    def counted(call: Call) -> Tensor:
        passes.append(call.layer)
        return original(call)

    monkeypatch.setattr(Call, "row_lse", counted)
    return passes


# --- 1: block mass ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_block_mass_is_the_block_sum_of_softmax(make: Any, block: int, padded: bool) -> None:
    data = make(grid=(3, 5, 13), text=6, batch=2)
    tokens = data.layout.tokens
    if padded:
        data.key_valid = torch.ones(2, tokens, dtype=torch.bool)
        data.key_valid[1, -4:] = False
        data.k[1, -4:] = data.v[1, -4:] = float("nan")
    call = data.call()
    mass = call.block_mass(call.row_lse(), block)
    count = block_count(tokens, block)
    pad = count * block - tokens
    weights = torch.nn.functional.pad(data.softmax(), (0, pad, 0, pad))
    expected = weights.view(2, 2, count, block, count, block).sum((3, 5))
    assert (mass - expected).abs().max() < 1e-12
    rows = block_sizes(tokens, block).double()
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, 2, -1))
    torch.testing.assert_close(mass.sum((-1, -2)), torch.full((2, 2), float(tokens)).double())
    assert row_mass_drift(mass, tokens, block).max() < 1e-12


# --- 2, 3: the LSE cache ---------------------------------------------------------------------


@pytest.mark.parametrize("stride", ROW_STRIDES)
def test_cached_lse_finds_the_same_mask_for_the_same_operands(
    make: Any, lse_passes: list[int], stride: int
) -> None:
    data = make(text=5, batch=2)
    method, memory = AdaSpa(0.5, SEARCH, row_stride=stride), {}
    first = found(method, data, memory).dense()
    for index in (1, 2, 3):
        call = data.call(index, memory)
        method.attend(call)
        assert call.phase is (Phase.REFRESH if index == 2 else Phase.SPARSE)
    assert len(lse_passes) == 1
    assert torch.equal(memory["mask"].dense(), first)
    assert memory["drift"].max() < 1e-12
    # The refresh did search: other operands give another mask under the same cached LSE.
    memory["found"] = 0
    method.attend(make(text=5, batch=2, seed=1).call(2, memory))
    assert not torch.equal(memory["mask"].dense(), first)
    assert len(lse_passes) == 1


def test_the_first_search_takes_the_lse_of_the_dense_pass(make: Any, lse_passes: list[int]) -> None:
    data = make(text=5, order="text_video")
    alone, fused = {}, {}
    found(AdaSpa(0.5, SEARCH), data, alone)
    assert len(lse_passes) == 1
    lse = data.call().row_lse()
    lse_passes.clear()
    call = data.call(0, fused)
    call.dense_attention = lambda with_lse: (data.attention(), lse if with_lse else None)
    AdaSpa(0.5, SEARCH).attend(call)
    assert not lse_passes
    torch.testing.assert_close(fused["lse"], alone["lse"])
    assert torch.equal(fused["mask"].dense(), alone["mask"].dense())


def test_without_the_cache_every_search_computes_lse(make: Any, lse_passes: list[int]) -> None:
    data, memory = make(), {}
    method = AdaSpa(0.5, SEARCH, lse_cache=False)
    for index in range(4):
        method.attend(data.call(index, memory))
    assert len(lse_passes) == 2
    assert set(memory) == {"mask", "found"}


@pytest.mark.parametrize("stride", ROW_STRIDES)
def test_an_lse_error_constant_in_each_query_block_changes_no_row(make: Any, stride: int) -> None:
    data, memory = make(), {}
    method = AdaSpa(0.5, SEARCH, head_adaptive=False, row_stride=stride)
    first = found(method, data, memory).dense()
    error = torch.randn(1, 2, data.layout.tokens // 64, generator=torch.Generator().manual_seed(3))
    memory["lse"] = memory["lse"] + error.double().repeat_interleave(64 // stride, -1)
    method.attend(data.call(2, memory))
    assert torch.equal(memory["mask"].dense(), first)
    assert memory["drift"].min() > 0.3


def test_an_uneven_lse_error_does_change_rows(make: Any) -> None:
    # Otherwise the test above would show nothing.
    data, memory = make(), {}
    method = AdaSpa(0.5, SEARCH, head_adaptive=False, row_stride=1)
    first = found(method, data, memory).dense()
    error = 3 * torch.randn(memory["lse"].shape, generator=torch.Generator().manual_seed(3))
    memory["lse"] = memory["lse"] + error.double()
    method.attend(data.call(2, memory))
    assert not torch.equal(memory["mask"].dense(), first)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("staleness", [None, 0.5])
@pytest.mark.parametrize("stride", ROW_STRIDES)
def test_the_guard_recomputes_a_stale_lse(
    make: Any, lse_passes: list[int], uneven: bool, staleness: float | None, stride: int
) -> None:
    data, memory = make(text=5), {}
    method = AdaSpa(0.5, SEARCH, staleness=staleness, row_stride=stride)
    first = found(method, data, memory).dense()
    truth = memory["lse"].clone()
    drift = torch.full_like(truth, 2.0)
    if uneven:
        drift[:, 1, ::2] = 0.0
        drift[:, 1, : 128 // stride] -= 4.0
    memory["lse"] = truth + drift
    method.attend(data.call(2, memory))
    recomputed = uneven and staleness is not None
    assert len(lse_passes) == (2 if recomputed else 1)
    assert bool((memory["drift"] > 0.5).any()) is uneven
    if not uneven or recomputed:
        assert torch.equal(memory["mask"].dense(), first)
    if recomputed:
        torch.testing.assert_close(memory["lse"], truth)


# --- rows that a search looks at --------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (4, 4, 4), (2, 3, 5)])
@pytest.mark.parametrize("block", [64, 128, (128, 64)])
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize(("text", "order"), [(0, "video_text"), (5, "text_video")])
def test_a_search_that_looks_at_some_rows_keeps_their_heaviest_blocks(
    make: Any, tile: Any, block: Any, stride: int, text: int, order: str
) -> None:
    data = make(grid=(4, 8, 21), text=text, order=order, batch=2)
    tokens = data.layout.tokens
    data.key_valid = torch.ones(2, tokens, dtype=torch.bool)
    if text:
        data.key_valid[1, 2] = False
        data.k[1, 2] = float("nan")
    method = AdaSpa(0.6, SEARCH, block, tile, head_adaptive=False, row_stride=stride)
    memory: dict[str, Any] = {}
    mask = found(method, data, memory)
    call = data.call()
    rows = call.spread_rows(tile, stride)
    assert memory["lse"].shape == (2, 2, -(-tokens // stride)) == (2, 2, len(rows))
    # The same from the whole matrix of attention weights.
    height, width = block_sides(block)
    perm = data.layout.ordering(tile or (1, 1, 21)).perm
    weights = data.softmax()[:, :, perm][..., perm]
    sums = torch.zeros(2, 2, block_count(tokens, height), tokens).double()
    sums.index_add_(2, rows // height, weights[:, :, rows])
    sums = torch.nn.functional.pad(sums, (0, -tokens % width))
    mass = sums.unflatten(-1, (-1, width)).sum(-1)
    free = tuple(video_blocks(data.layout, side) for side in (height, width))
    kept = max(1, round(0.4 * free[1]))
    best = mass[:, :, : free[0], : free[1]].topk(kept).indices
    wanted = torch.zeros(2, 2, *free, dtype=torch.bool).scatter(-1, best, True)
    assert torch.equal(mask.dense()[:, :, : free[0], : free[1]], wanted)
    if free[1] > 2:
        assert not torch.equal(mask.dense(), found(replace(method, row_stride=1), data).dense())
    # The rows of a fresh log-sum-exp sum to their number.
    method.attend(data.call(2, memory))
    assert memory["drift"].max() < 1e-12
    assert torch.equal(memory["mask"].dense(), mask.dense())


def test_the_first_search_and_later_ones_may_look_at_other_rows(make: Any) -> None:
    data, all_rows, some = make(text=5), {}, {}
    first = found(AdaSpa(0.5, SEARCH, row_stride=1), data, all_rows).dense()
    fewer = found(AdaSpa(0.5, SEARCH, row_stride=4), data, some).dense()
    assert not torch.equal(first, fewer)
    memory: dict[str, Any] = {}
    method = AdaSpa(0.5, SEARCH, row_stride=(1, 4))
    assert AdaSpa().row_stride == (2, 4)
    assert torch.equal(found(method, data, memory).dense(), first)
    assert torch.equal(memory["lse"], some["lse"])
    method.attend(data.call(2, memory))
    assert torch.equal(memory["mask"].dense(), fewer)
    without = {"found": 0}
    replace(method, lse_cache=False).attend(data.call(2, without))
    assert torch.equal(without["mask"].dense(), fewer)
    assert "lse" not in without


@pytest.mark.parametrize("stride", [0, 3, 8, 2.0, True, (1,), (1, 3), (1, 2, 4), "2"])
def test_impossible_strides_are_refused(stride: Any) -> None:
    with pytest.raises(ValueError, match=r"row_stride must be one of \(1, 2, 4\)"):
        AdaSpa(row_stride=stride)


# --- 4: exactness ----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (4, 4, 4), (2, 3, 5)])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("text", "order"), [(0, "video_text"), (5, "text_video")])
def test_without_sparsity_nothing_changes(
    make: Any, tile: tuple[int, int, int] | None, block: int, text: int, order: str
) -> None:
    memory: dict[str, Any] = {}
    method = AdaSpa(0.0, SEARCH, block, tile)
    for index in range(3):
        data = make(text=text, order=order, seed=index)
        call = data.call(index, memory)
        out = method.attend(call)
        assert (out - data.attention()).abs().max() < 1e-12
        assert call.phase is (Phase.SEARCH, Phase.SPARSE, Phase.REFRESH)[index]
        assert memory["mask"].dense().all()


def test_dense_and_search_steps_return_the_models_own_tensor(make: Any) -> None:
    data, memory = make(text=5), {}
    method = AdaSpa(0.8, (2,))
    for index in range(3):
        call = data.call(index, memory)
        sentinel = torch.empty(0)
        call.dense_attention = lambda with_lse, sentinel=sentinel: (sentinel, None)
        assert (method.attend(call) is sentinel) is (index < 2)
        assert ("mask" in memory) is (index >= 1)


@pytest.mark.parametrize("tile", [None, (4, 4, 4)])
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_sparse_output_is_softmax_over_the_kept_pairs(
    make: Any, tile: tuple[int, int, int] | None, text: int, order: str
) -> None:
    data, memory = make(text=text, order=order, batch=2), {}
    method = AdaSpa(0.6, (0,), tile=tile)
    mask = found(method, data, memory)
    call = data.call(1, memory)
    out = method.attend(call)
    keep = data.kept(mask, tile)
    assert not keep.all()
    assert (out - data.attention(keep)).abs().max() < 1e-10
    assert (out - data.attention()).abs().max() > 1e-4
    torch.testing.assert_close(call.head_density, keep.double().mean((-1, -2)).float())


def test_batch_elements_have_their_own_masks(make: Any) -> None:
    both, memory = make(text=7, batch=2), {}
    both.key_valid = torch.ones(2, both.layout.tokens, dtype=torch.bool)
    both.key_valid[1, -5:] = False
    method = AdaSpa(0.6, (0,))
    mask = found(method, both, memory)
    out = method.attend(both.call(1, memory))
    assert not torch.equal(mask.dense()[0], mask.dense()[1])
    for element in range(2):
        one = make(text=7)
        index = slice(element, element + 1)
        one.q, one.k, one.v, one.key_valid = (
            x[index] for x in (both.q, both.k, both.v, both.key_valid)
        )
        alone: dict[str, Any] = {}
        assert torch.equal(found(method, one, alone).dense(), mask.dense()[index])
        assert (method.attend(one.call(1, alone)) - out[index]).abs().max() < 1e-12


@pytest.mark.parametrize("order", ["video_text", "text_video"])
def test_padding_is_never_read(make: Any, order: str) -> None:
    data = make(text=21, order=order, batch=2)
    data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
    end = data.layout.text if order == "text_video" else data.layout.tokens
    data.key_valid[0, end - 9 : end] = False
    padding = ~data.key_valid
    method, results = AdaSpa(0.6, SEARCH), []
    for poison in (0.0, 50.0, float("nan")):
        data.k[padding] = data.v[padding] = poison
        memory: dict[str, Any] = {}
        outs = [method.attend(data.call(index, memory)) for index in range(3)]
        results.append((torch.stack(outs), memory["mask"].dense(), memory["lse"]))
        assert outs[1].isfinite().all()
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)


# --- 5: the budget ---------------------------------------------------------------------------


recalls = st.integers(1, 9).flatmap(
    lambda heads: st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=heads, max_size=heads), min_size=1, max_size=3
    )
)


@settings(max_examples=200, deadline=None)
@given(recalls, st.floats(0, 1, exclude_max=True))
def test_levels_have_the_mean_asked_for(rows: list[list[float]], sparsity: float) -> None:
    recall = torch.tensor(rows)
    levels = head_levels(recall, sparsity)
    torch.testing.assert_close(
        levels.double().mean(-1), torch.full((len(rows),), sparsity).double(), rtol=0, atol=1e-6
    )
    high, low = (1 + sparsity) / 2, (3 * sparsity - 1) / 2
    if low < 0:
        high, low = 2 * sparsity, 0.0
    allowed = torch.tensor([low, sparsity, high])
    assert ((levels[..., None] - allowed).abs().amin(-1) < 1e-6).all()
    assert ((levels >= 0) & (levels <= 1)).all()
    # A head of higher recall never keeps more.
    ranked = levels.gather(-1, recall.argsort(dim=-1, descending=True, stable=True))
    assert (ranked.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize(
    ("recall", "sparsity", "expected"),
    [
        ([0.9, 0.5, 0.7, 0.6], 0.8, [0.9, 0.7, 0.8, 0.8]),
        # 0.8 itself is not above the threshold.
        ([0.8, 0.5, 0.7, 0.6], 0.8, [0.8, 0.8, 0.8, 0.8]),
        # More easy heads than half: the two groups meet but do not overlap.
        ([0.9, 0.95, 0.99, 0.85], 0.8, [0.7, 0.9, 0.9, 0.7]),
        ([0.9, 0.95, 0.99, 0.85, 0.97], 0.8, [0.7, 0.8, 0.9, 0.7, 0.9]),
        # Below a third the lower level would be negative.
        ([0.9, 0.5, 0.7], 0.25, [0.5, 0.0, 0.25]),
        ([1.0, 1.0], 0.0, [0.0, 0.0]),
        ([1.0], 0.8, [0.8]),
        # Equal recalls: head order decides.
        ([0.9, 0.9, 0.9, 0.9], 0.8, [0.9, 0.9, 0.7, 0.7]),
    ],
)
def test_levels(recall: list[float], sparsity: float, expected: list[float]) -> None:
    levels = head_levels(torch.tensor([recall]), sparsity)
    torch.testing.assert_close(levels, torch.tensor([expected]))


@pytest.mark.parametrize(("text", "order"), TEXTS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_rows_of_a_head_keep_equally_many_video_blocks(
    make: Any, text: int, order: str, adaptive: bool
) -> None:
    data = make(grid=(4, 8, 20), text=text, order=order, heads=4, sharp=1.0)
    # Two heads attend to few blocks, two to all.
    data.q[:, :, :2] *= 8
    mask = found(AdaSpa(0.6, (0,), head_adaptive=adaptive), data)
    video = data.layout.video // 64
    assert video == 10
    counts = mask.dense()[..., :video, :video].sum(-1)
    assert (counts == counts[..., :1]).all()
    assert counts.double().mean() == 4
    if not adaptive:
        assert (counts == 4).all()


@pytest.mark.parametrize(("text", "order"), TEXTS)
@pytest.mark.parametrize("block", [(128, 64), (64, 128)])
def test_query_and_key_blocks_may_differ(
    make: Any, text: int, order: str, block: tuple[int, int]
) -> None:
    data = make(grid=(4, 8, 20), text=text, order=order)
    mask = found(AdaSpa(0.6, (0,), head_adaptive=False, block=block), data)
    assert mask.block == block
    rows, columns = 640 // block[0], 640 // block[1]
    kept = mask.dense()
    assert (kept[..., :rows, :columns].sum(-1) == round(0.4 * columns)).all()
    assert kept[..., rows:, :].all() and kept[..., columns:].all()
    exact = AdaSpa(0.0, (0, 9), block=block)
    memory: dict[str, Any] = {}
    exact.attend(data.call(0, memory))
    assert (exact.attend(data.call(1, memory)) - data.attention()).abs().max() < 1e-12


def test_head_adaptive_search_moves_budget_from_easy_to_hard_heads(make: Any) -> None:
    data = make(grid=(4, 8, 20), heads=4, sharp=0.1, dim=16)
    # Head 2 looks only at keys of its own block: all of its mass is in one block of ten.
    blocks = torch.arange(640) // 64
    data.q[:, :, 2] = data.k[:, :, 2] = 9 * torch.eye(16).double()[blocks]
    mask = found(AdaSpa(0.6, (0,), tile=None), data)
    counts = mask.dense()[0, :, 0].sum(-1).tolist()
    assert counts[2] == 2
    assert sorted(counts) == [2, 4, 4, 6]


@pytest.mark.parametrize(
    ("sparsity", "blocks", "kept"), [(0.8, 10, 2), (0.99, 10, 1), (0.0, 7, 7), (0.7, 10, 3)]
)
def test_a_row_keeps_the_rounded_share_and_never_nothing(
    sparsity: float, blocks: int, kept: int
) -> None:
    assert int(kept_blocks(torch.tensor([[sparsity]]), blocks)) == kept


# --- 6: text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("tile", [None, (4, 4, 4)])
@pytest.mark.parametrize(("text", "order"), TEXTS)
def test_text_sees_and_is_seen_by_everything(
    make: Any, block: int, tile: tuple[int, int, int] | None, text: int, order: str
) -> None:
    # 800 video tokens end inside a block of either size.
    data = make(grid=(4, 10, 20), text=text, order=order)
    mask = found(AdaSpa(0.7, (0,), block, tile), data)
    keep = data.kept(mask, tile)
    is_text = data.layout.coords()[:, 0] < 0
    assert int(is_text.sum()) == text
    assert keep[..., is_text, :].all()
    assert keep[..., is_text].all()
    assert not keep[..., ~is_text, :][..., ~is_text].all()


def test_text_that_shares_the_only_block_with_video_leaves_it_dense(make: Any) -> None:
    data, memory = make(grid=(1, 5, 5), text=5), {}
    method = AdaSpa(0.9, (0,))
    assert found(method, data, memory).dense().all()
    assert (method.attend(data.call(1, memory)) - data.attention()).abs().max() < 1e-12


# --- 7: optimality ---------------------------------------------------------------------------


def test_no_other_mask_of_the_same_row_count_keeps_more_mass(make: Any) -> None:
    data, memory = make(grid=(4, 8, 16)), {}
    method = AdaSpa(0.6, (0,), tile=None, head_adaptive=False)
    mask = found(method, data, memory).dense()
    mass = data.call().block_mass(data.call().row_lse(), 64)
    kept = int(mask[0, 0, 0].sum())
    best = (mass * mask).sum((-1, -2))
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        rank = torch.rand(mask.shape, generator=rng).argsort(-1).argsort(-1)
        assert (best >= (mass * (rank < kept)).sum((-1, -2))).all()
    # The complement is as far as one can get from it.
    assert (best > kept / 8 * data.layout.tokens).all()


# --- 8: planted structure --------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_blocks_are_found(
    make: Any, tile: tuple[int, int, int] | None, dtype: torch.dtype
) -> None:
    data = make(grid=(4, 8, 16), heads=3, dim=16, batch=2, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    blocks, axes = 8, torch.eye(16, dtype=dtype)
    wanted = torch.rand(2, 3, blocks, blocks, generator=rng).argsort(-1) < 2
    place = torch.arange(512) // 64
    # Keys of a block share an axis; queries of a block point along the axes of its two targets.
    k = axes[place][None, :, None].expand(2, -1, 3, -1)
    q = 40 * (wanted.to(dtype) @ axes[:blocks])[:, :, place].transpose(1, 2)
    order = data.layout.ordering(tile or (1, 1, 16))
    data.q, data.k = order.undo(q), order.undo(k)
    memory: dict[str, Any] = {}
    method = AdaSpa(0.75, (0,), tile=tile, head_adaptive=False)
    assert torch.equal(found(method, data, memory).dense(), wanted)
    out = method.attend(data.call(1, memory))
    torch.testing.assert_close(out, data.attention(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_permuting_heads_permutes_masks(make: Any, adaptive: bool) -> None:
    data = make(heads=5, text=5, sharp=1.0)
    data.q *= torch.tensor([1.0, 9.0, 0.5, 6.0, 2.0]).double()[:, None]
    method = AdaSpa(0.6, (0,), head_adaptive=adaptive)
    mask = found(method, data).dense()
    index = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(found(method, data.heads(index)).dense(), mask[:, index])
    assert not torch.equal(mask, mask[:, index])


# --- 9: states -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "refreshes", "first"), [((3, 6), {5}, 2), ((0, 6), {5}, 0), ((2,), set(), 1)]
)
def test_states_of_two_interleaved_branches(
    make: Any, search: tuple[int, ...], refreshes: set[int], first: int
) -> None:
    run, method, total = Run(), AdaSpa(0.5, search, row_stride=1), 8
    expected = [
        Phase.DENSE
        if n < first
        else Phase.SEARCH
        if n == first
        else Phase.REFRESH
        if n in refreshes
        else Phase.SPARSE
        for n in range(total)
    ]
    operands = [make(grid=(2, 8, 16), seed=seed) for seed in (0, 1)]
    alone = [found(AdaSpa(0.5, (0,), row_stride=1), data).dense() for data in operands]
    assert not torch.equal(*alone)
    timesteps = tuple(1000.0 - 100 * index for index in range(total))
    for generation in range(2):
        seen: list[list[Phase]] = [[], []]
        for index in range(total):
            for which, data in enumerate(operands):
                timestep = torch.tensor([timesteps[index]])
                branch = run.enter(0, timestep, data.layout, timesteps, data.q)
                memory = branch.memory.setdefault(0, {})
                if index == 0:
                    assert memory == {}
                call = data.call(index, memory, total)
                call.step = branch.step
                method.attend(call)
                seen[which].append(call.phase)
                assert branch.step.generation == generation
                if index >= first:
                    assert torch.equal(memory["mask"].dense(), alone[which])
        assert seen == [expected, expected]


def test_a_skipped_search_is_made_up_for(make: Any) -> None:
    data, memory = make(), {}
    method = AdaSpa(0.5, (3,))
    phases = []
    for index in (0, 1, 5, 6):
        call = data.call(index, memory)
        method.attend(call)
        phases.append(call.phase)
    assert phases == [Phase.DENSE, Phase.DENSE, Phase.SEARCH, Phase.SPARSE]


# --- memory ----------------------------------------------------------------------------------


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_matrix_of_all_pairs_is_ever_made(make: Any) -> None:
    data = make(grid=(4, 16, 32), text=70, heads=1, dtype=torch.float32)
    pairs, memory = data.layout.tokens**2, {}
    dense = data.attention()
    method = AdaSpa(0.8, SEARCH)
    with LargestOutput() as largest:
        for index in range(3):
            call = data.call(index, memory)
            call.dense_attention = lambda with_lse: (dense, None)
            method.attend(call)
    assert 0 < largest.numel < pairs / 2
    with LargestOutput() as largest:
        data.attention()
    assert largest.numel >= pairs


# Gigabytes that a generation holds: tokens, layers * heads, CFG copies, LSE, bit masks of 64.
TABLE = {
    "CogVideoX-2B": (17_776, 30 * 30, 2, 0.13, 0.02),
    "CogVideoX1.5-5B": (45_106, 42 * 48, 2, 0.73, 0.25),
    "HunyuanVideo": (119_056, 60 * 24, 1, 0.69, 0.62),
    "Wan2.1-14B": (75_600, 40 * 40, 2, 0.97, 0.56),
    "Wan2.1-1.3B": (32_760, 30 * 12, 2, 0.09, 0.02),
}


@pytest.fixture
def held(make: Any) -> tuple[float, float]:
    """Bytes of LSE per token and of masks per block pair, in one head, as a small run holds."""
    data, memory = make(grid=(4, 32, 32), heads=1, dtype=torch.float32, dim=4), {}
    found(AdaSpa(0.8, (0,), row_stride=1), data, memory)
    assert set(memory) == {"mask", "lse", "found"}
    lse = memory["lse"]
    pairs = block_count(data.layout.tokens, 64) ** 2
    mask = memory["mask"]
    assert mask.nbytes() == mask.bits.numel() + 4  # the density of the one head
    return lse.numel() * lse.element_size() / data.layout.tokens, mask.bits.numel() / pairs


@pytest.mark.parametrize("model", TABLE)
def test_cached_lse_fits_its_budget(model: str, held: tuple[float, float]) -> None:
    tokens, heads, copies, budget, _ = TABLE[model]
    assert held[0] * tokens * heads * copies / 1e9 <= budget * 1.05


@pytest.mark.parametrize("model", TABLE)
def test_masks_fit_their_budget(model: str, held: tuple[float, float]) -> None:
    tokens, heads, copies, _, budget = TABLE[model]
    assert round(held[1] * block_count(tokens, 64) ** 2 * heads * copies / 1e9, 2) <= budget


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"sparsity": -0.1}, {"sparsity": True}, {"search": ()}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sparsity|search"):
        AdaSpa(**wrong)


def test_a_grid_smaller_than_a_tile_is_one_tile(make: Any) -> None:
    data, memory = make(grid=(1, 3, 3), text=2), {}
    assert data.layout == TokenLayout((1, 3, 3), 2)
    method = AdaSpa(0.8, (0,), tile=(4, 4, 4))
    assert found(method, data, memory).shape == (1, 2, 1, 1)
    assert (method.attend(data.call(1, memory)) - data.attention()).abs().max() < 1e-12
