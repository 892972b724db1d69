"""MoA without weights: the choice, the spans, and what a generation does."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.moa import MoA, choose_spans, span_masks
from dit_sparse.schedule import Phase

SPANS = ((0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.2, 0.2), (1.0, 1.0, 1.0))


def total(losses: np.ndarray, choice: np.ndarray) -> float:
    return float(np.take_along_axis(losses, choice[..., None], -1).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 1.0), st.sampled_from([None, 1, 2]))
def test_the_choice_is_the_best_of_all_within_the_budget(
    seed: int, budget: float, distinct: int | None
) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.random((2, 3, 3)) * 10.0 ** rng.integers(-3, 3, (2, 3, 1))
    cost = np.array([0.1, 0.4, 1.0])
    best = float("inf")
    for flat in itertools.product(range(3), repeat=6):
        choice = np.array(flat).reshape(2, 3)
        if distinct is not None and max(len(set(row)) for row in choice.tolist()) > distinct:
            continue
        if cost[choice].mean() <= budget + 1e-9:
            best = min(best, total(losses, choice))
    found = choose_spans(losses, cost, budget, distinct)
    assert cost[found].mean() <= budget + 1e-5
    assert total(losses, found) <= best * (1 + 2e-3) + 1e-6 * losses.max()
    if distinct is not None:
        assert max(len(set(row)) for row in found.tolist()) <= distinct


def test_greedy_choice_is_beaten() -> None:
    # Per cost, head 0 gains most from the middle span, and then nothing is left for head 1.
    losses = np.array([[[1.0, 0.5, 0.4], [1.0, 0.9, 0.0]]])
    cost = np.array([0.0, 0.4, 1.0])
    assert choose_spans(losses, cost, 0.5).tolist() == [[0, 2]]


def test_loss_never_rises_with_the_budget_and_ties_are_settled() -> None:
    rng = np.random.default_rng(0)
    losses, cost = rng.random((4, 6, 4)), np.array([0.1, 0.2, 0.5, 1.0])
    found = [total(losses, choose_spans(losses, cost, b)) for b in np.linspace(0.1, 1, 10)]
    assert all(later <= before * 1.001 for before, later in itertools.pairwise(found))
    even = np.ones((4, 6, 4))
    assert (choose_spans(even, cost, 0.5) == choose_spans(even, cost, 0.5)).all()


def test_a_budget_that_no_span_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keeps a mean of 0\.050"):
        choose_spans(np.ones((1, 2, 2)), np.array([0.1, 1.0]), 0.05)


@pytest.mark.parametrize("tile", [None, (4, 4, 4)])
@pytest.mark.parametrize(
    "layout", [TokenLayout((8, 8, 16)), TokenLayout((5, 9, 21), 9, "text_video")]
)
def test_spans_are_gaps_between_boxes(layout: TokenLayout, tile: Any) -> None:
    spans = ((0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.3, 0.3, 0.3), (1.0, 1.0, 1.0))
    keep, density = span_masks(layout, tile, 64, spans)
    assert keep[-1].all()
    order = layout.ordering(tile or (1, 1, layout.grid[2]))
    coords = layout.coords()[order.perm]
    blocks = layout.video // 64 if layout.text else -(-layout.video // 64)
    boxes = [coords[64 * b : min(64 * b + 64, layout.video)] for b in range(blocks)]
    for number, span in enumerate(spans):
        reach = torch.tensor(span) * torch.tensor(layout.grid)
        for p in range(blocks):
            for c in range(blocks):
                # The least distance of any two coordinates where the boxes do not overlap.
                gap = torch.stack(
                    [
                        (boxes[c].amin(0) - boxes[p].amax(0)),
                        (boxes[p].amin(0) - boxes[c].amax(0)),
                    ]
                ).amax(0)
                assert bool(keep[number, p, c]) is bool((gap <= reach).all())
        assert keep[number, blocks:].all() and keep[number][:, blocks:].all()
    sizes = torch.tensor([len(box) for box in boxes]).double()
    free = keep[:, :blocks, :blocks].double()
    exact = torch.einsum("spc,p,c->s", free, sizes, sizes) / sizes.sum() ** 2
    np.testing.assert_allclose(density, exact, rtol=1e-6)


def generation(method: MoA, layers: list[Any], steps: int = 3) -> list[list[Any]]:
    """(call, output) of all layers, step by step."""
    memories: list[dict[str, Any]] = [{} for _ in layers]
    shared: dict[str, Any] = {}
    seen: list[list[Any]] = []
    for index in range(steps):
        seen.append([])
        for layer, data in enumerate(layers):
            call = data.call(index, memories[layer])
            call.layer, call.layers, call.shared = layer, len(layers), shared
            seen[-1].append((call, method.attend(call)))
    return seen


def kept(call: Any, data: Any, tile: Any = (4, 4, 4)) -> torch.Tensor:
    return data.kept(call.memory["mask"], tile).expand(1, data.q.shape[2], -1, -1)


@pytest.mark.parametrize(("text", "order"), [(0, "video_text"), (7, "text_video")])
def test_losses_are_relative_errors_of_the_output(make: Any, text: int, order: str) -> None:
    data = make(text=text, order=order, heads=3, batch=2)
    data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
    data.key_valid[1, 5:7] = False
    data.k[1, 5:7] = data.v[1, 5:7] = float("nan")
    method = MoA(0.5, SPANS, warmup=1)
    ((call, out),) = generation(method, [data], 1)[0]
    assert call.phase is Phase.SEARCH
    dense = data.attention()
    assert torch.equal(out, dense)
    assert call.memory["losses"][:, -1].max() < 1e-20
    keep, _ = span_masks(data.layout, (4, 4, 4), 64, SPANS)
    inverse = data.layout.ordering((4, 4, 4)).inverse
    tokens = data.layout.tokens
    for number, blocks in enumerate(keep):
        pairs = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:tokens, :tokens]
        sparse = data.attention(pairs[inverse][:, inverse])
        there = data.key_valid[..., None, None]
        error = ((sparse - dense).square() * there).sum((0, 1, 3))
        expected = error / (dense.square() * there).sum((0, 1, 3))
        torch.testing.assert_close(call.memory["losses"][:, number], expected)


def test_output_is_softmax_over_the_chosen_spans(make: Any) -> None:
    layers = [make(text=5, order="text_video", heads=4, seed=s, sharp=0.5) for s in range(2)]
    for row in generation(MoA(0.4, SPANS, warmup=1), layers)[1:]:
        for (call, out), data in zip(row, layers, strict=True):
            assert call.phase is Phase.SPARSE
            assert (out - data.attention(kept(call, data))).abs().max() < 1e-10
        # 512 video tokens: eight blocks, and one of text.
        video = [call.memory["mask"].dense()[..., :8, :8].double().mean() for call, _ in row]
        assert torch.stack(video).mean() <= 0.6 + 1e-6


@pytest.fixture
def uneven(make: Any) -> list[Any]:
    """Two layers of two heads: all attend to their own tile but head 1 of layer 1."""
    layers = []
    for layer in range(2):
        data = make(grid=(8, 8, 16), dim=16, heads=2, seed=layer)
        order = data.layout.ordering((4, 4, 4))
        axes = torch.eye(16).double()[torch.arange(1024) // 64]
        data.q = order.undo(40 * axes[None, :, None].expand(1, -1, 2, -1)).clone()
        data.k = order.undo(axes[None, :, None].expand(1, -1, 2, -1)).clone()
        if layer == 1:
            data.q[:, :, 1] = 0
        layers.append(data)
    return layers


def test_the_budget_goes_where_it_is_needed(uneven: list[Any]) -> None:
    def choice(scope: str, sparsity: float) -> dict[int, list[int]]:
        call, _ = generation(MoA(sparsity, SPANS, scope, warmup=1), uneven, 2)[1][0]  # type: ignore
        return call.branch_shared["choice"]

    # One dense head of four and three tiles of sixteen: a mean density of 0.297.
    assert choice("model", 0.7) == {0: [0, 0], 1: [0, 3]}
    # Layer 1 alone has no such budget.
    assert choice("layer", 0.7)[1][1] != 3
    assert choice("layer", 0.45)[1] == [0, 3]


def test_one_choice_a_generation_serves_all_layers(
    uneven: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_sparse.methods import moa

    solved: list[int] = []

    def counted(losses: np.ndarray, *rest: Any) -> Any:
        solved.append(len(losses))
        return choose_spans(losses, *rest)

    monkeypatch.setattr(moa, "choose_spans", counted)
    method = MoA(0.7, SPANS, warmup=2)
    seen = generation(method, uneven, 4)
    assert [call.phase.value for row in seen for call, _ in row] == (
        ["dense"] * 2 + ["search"] * 2 + ["sparse"] * 4
    )
    assert solved == [2]
    # A layer that a step cache kept from searching chooses for itself later on.
    solved.clear()
    shared, memories = {}, [{}, {}]
    for index, layers in enumerate([(), (0,), (0, 1), (0, 1)]):
        for layer in layers:
            call = uneven[layer].call(index, memories[layer])
            call.layer, call.layers, call.shared = layer, 2, shared
            method.attend(call)
    assert solved == [1, 1]
    assert set(call.branch_shared["choice"]) == {0, 1}


def test_a_plan_is_followed_without_a_search(uneven: list[Any]) -> None:
    method = MoA(0.7, SPANS, plan=((0, 1), (2, 3)), warmup=1)
    seen = generation(method, uneven, 2)
    assert [call.phase for call, _ in seen[0]] == [Phase.DENSE] * 2
    keep, _ = span_masks(uneven[0].layout, (4, 4, 4), 64, SPANS)
    for (call, _), places in zip(seen[1], method.plan or (), strict=True):
        assert torch.equal(call.memory["mask"].dense()[0], keep[list(places)])
    with pytest.raises(ValueError, match="plan must have 2 layers of 2 heads"):
        generation(MoA(0.7, SPANS, plan=((0, 1),), warmup=0), uneven, 1)


def test_few_different_spans_in_a_layer(make: Any) -> None:
    layers = [make(heads=6, seed=s, sharp=float(s)) for s in (1, 4)]
    free, few = (
        generation(MoA(0.5, SPANS, distinct=d, warmup=1), layers, 2)[1][0][0] for d in (None, 1)
    )
    free, few = (call.branch_shared["choice"] for call in (free, few))
    assert max(len(set(heads)) for heads in free.values()) > 1
    assert [len(set(heads)) for heads in few.values()] == [1, 1]


def test_no_matrix_of_all_pairs_is_ever_made(make: Any, largest_output: Any) -> None:
    data = make(grid=(4, 20, 32), text=70, heads=1, dtype=torch.float32)
    dense, memory, shared = data.attention(), {}, {}
    with largest_output as largest:
        for index in range(2):
            call = data.call(index, memory)
            call.shared = shared
            call.dense_attention = lambda with_lse: (dense, None)
            MoA(0.6, warmup=1).attend(call)
    assert 0 < largest.numel < data.layout.tokens**2 / 2


def test_an_image_smaller_than_a_block_is_dense(make: Any) -> None:
    data = make(grid=(1, 5, 5), text=5)
    for ((call, out),) in generation(MoA(0.9, warmup=1), [data]):
        assert (out - data.attention()).abs().max() < 1e-12
        if call.phase is Phase.SPARSE:
            assert call.memory["mask"].dense().all()


def test_impossible_settings_are_refused(make: Any) -> None:
    for option, wrong in {
        "sparsity": {"sparsity": 1.0},
        "spans": {"spans": ()},
        "span": {"spans": ((0.0, 0.0, 1.5),)},
        "scope": {"scope": "head"},
        "distinct": {"distinct": 0},
        "plan": {"plan": ((99,),)},
    }.items():
        with pytest.raises(ValueError, match=option):
            MoA(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shortest of the spans keeps"):
        generation(MoA(0.99, SPANS, warmup=1), [make()], 1)
