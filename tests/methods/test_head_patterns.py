"""Estimates from sampled rows, ranks and budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.head_patterns import (
    Wanted,
    a_shape_ranks,
    block_weights,
    choose,
    cut,
    line_ranks,
    recall,
    sampled_attention,
    sampled_places,
)
from dit_sparse.methods.pattern_table import A_SHAPE, GRID, VERTICAL_SLASH
from dit_sparse.methods.strides import token_group

CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "samples"), [(7, 64), (64, 64), (1000, 64), (75_600, 128)])
def test_samples_take_one_of_every_stratum(count: int, samples: int) -> None:
    places = sampled_places(count, samples, CPU)
    assert len(places) == min(count, samples)
    strata = torch.arange(len(places) + 1) * count / len(places)
    assert ((places >= strata[:-1].floor()) & (places < strata[1:].ceil())).all()
    assert (places.diff() > 0).all()
    if count == 75_600:
        # Wan 720p: every frame, and columns and rows all over the frame.
        column, row, frame = places % 80, places // 80 % 45, places // 3600
        assert len(frame.unique()) == 21
        assert len(column.unique()) > 60
        assert len(row.unique()) > 35


def test_sampled_attention_leaves_padding_out(make: Any) -> None:
    data = make(grid=(2, 4, 8), text=10, batch=2)
    data.key_valid = torch.ones(2, 74, dtype=torch.bool)
    data.key_valid[0, 60:] = False
    rows = torch.tensor([0, 30, 62])
    results = []
    for poison in (0.0, float("nan")):
        data.q[0, 60:] = data.k[0, 60:] = poison
        results.append(sampled_attention(data.call(), rows, [1]))
    assert torch.equal(*results)
    weights = results[0]
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 1).double())
    torch.testing.assert_close(weights[0, 0, :2], data.softmax()[0, 1, rows[:2]] / 2)
    assert (weights[0, 0, 2] == 0).all()
    torch.testing.assert_close(weights[1, 0], data.softmax()[1, 1, rows] / 3)
    both = sampled_attention(make().call(), rows, [0, 1])
    assert torch.equal(both[:, :1], sampled_attention(make().call(), rows, [0]))


def test_block_weights_follow_the_order_of_each_head() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 4, 37, generator=rng)
    order = torch.rand(2, 3, 37, generator=rng).argsort(-1)
    # 37 tokens in blocks of 8: 4 of video alone, and 5 with the ragged one.
    for blocks in (4, 5):
        got = block_weights(weights, order, 8, blocks)
        for b in range(2):
            for h in range(3):
                moved = weights[b, h][:, order[b, h]]
                expected = [moved[:, c * 8 : c * 8 + 8].sum(-1) for c in range(blocks)]
                torch.testing.assert_close(got[b, h], torch.stack(expected, -1))


def test_planted_columns_and_diagonals_rank_first() -> None:
    blocks = 12
    place = torch.arange(24)[None, None] % blocks
    weights = torch.full((1, 1, 24, blocks), 1e-3)
    weights[..., 5] += 0.1
    for offset in (3, -7):
        target = place[0, 0] - offset
        inside = (target >= 0) & (target < blocks)
        weights[0, 0, inside.nonzero()[:, 0], target[inside]] += 0.2
    ranks = line_ranks(weights, place, blocks)[0, 0]
    at = torch.arange(blocks)
    offset = at[:, None] - at
    assert (ranks[offset == 0] == 1).all()
    for line, rank in ((offset == 3, {2, 3}), (offset == -7, {2, 3})):
        assert set(ranks[line].tolist()) <= rank
    column = (at == 5).expand(blocks, blocks) & (offset != 0) & (offset != 3) & (offset != -7)
    assert (ranks[column] == 4).all()
    others = (offset != 0) & (offset != 3) & (offset != -7) & (at != 5)
    assert ranks[others].min() > 4
    kept = int((ranks <= 4).sum())
    keep = cut(ranks[None, None], torch.tensor([float(kept)]))
    assert torch.equal(keep[0, 0], ranks <= 4)


def test_one_row_does_not_make_a_far_diagonal_heavy() -> None:
    blocks, place = 16, torch.arange(16)[None, None]
    weights = torch.zeros(1, 1, 16, blocks)
    # Only row 15 reaches offset 15; offset 1 holds as much in each of its 15 rows, halved.
    weights[0, 0, 15, 0] = 0.1
    weights[0, 0, torch.arange(1, 16), torch.arange(15)] = 0.06
    ranks = line_ranks(weights, place, blocks)[0, 0]
    assert ranks[5, 4] < ranks[15, 0]


@pytest.mark.parametrize("shape", [(9, 9), (5, 13), (13, 5)])
def test_a_cut_is_within_half_a_line_of_the_budget(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(2)
    place = torch.randint(shape[0] + 1, (2, 3, 20), generator=rng)
    ranks = line_ranks(torch.rand(2, 3, 20, shape[1], generator=rng), place, shape[0])
    cells = shape[0] * shape[1]
    for density in (0.3, 0.5, 0.9, 1.0):
        budget = torch.full((3,), density * cells)
        kept = cut(ranks, budget).sum((-1, -2))
        assert ((kept - density * cells).abs() <= max(shape) / 2 + 0.5).all()
        assert density < 1 or (kept == cells).all()
    # A budget of nothing still leaves no row of a square mask empty.
    least = cut(ranks, torch.zeros(3))
    assert shape[0] != shape[1] or (least.sum(-1) >= 1).all()


def test_a_shape_is_a_sink_and_a_band() -> None:
    group = token_group(TokenLayout((4, 16, 16)), None, False, ("t",), None, 64, CPU)
    ranks = a_shape_ranks(group, group)
    at = torch.arange(16)
    ahead = at - at[:, None]
    assert (ranks[:, :2] == 1).all()
    assert (ranks.diagonal() == 1).all()
    # The band grows on both sides, by one block at a time.
    for rank in range(2, 16):
        side = rank // 2 if rank % 2 else -rank // 2
        assert torch.equal(ranks[:, 2:] == rank, ahead[:, 2:] == side)
    # Frames 2 and 3 alone against all: the band stays at their own place.
    later = token_group(TokenLayout((4, 16, 16)), ((512, 1024),), False, ("t",), None, 64, CPU)
    assert torch.equal(a_shape_ranks(later, group), ranks[8:])
    # All against frames 2 and 3: what lies before them is nearest to their beginning.
    upper = a_shape_ranks(group, later)
    assert torch.equal(upper[8:, 2:], ranks[8:, 10:])
    assert torch.equal(upper[0, 2:], torch.arange(5, 17, 2))


def test_recall_is_the_kept_share() -> None:
    rng = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 6, 4, generator=rng)
    place = torch.randint(5, (2, 3, 6), generator=rng)
    keep = torch.rand(2, 3, 4, 4, generator=rng) < 0.5
    got = recall(weights, place, keep)
    for b in range(2):
        for h in range(3):
            rows = [r for r in range(6) if place[b, h, r] < 4]
            kept = sum((weights[b, h, r] * keep[b, h, place[b, h, r]]).sum() for r in rows)
            torch.testing.assert_close(got[b, h], kept / weights[b, h, rows].sum())


def kinds(data: Any, wanted: Wanted) -> Any:
    group = token_group(data.layout, None, False, ("t", "hw", "w"), None, 64, CPU)
    rows = sampled_places(group.video, 128, CPU)
    weights = sampled_attention(data.call(), rows, list(range(data.q.shape[2])))
    return choose(weights, rows, group, group, wanted)


def test_heads_get_the_pattern_that_was_planted(make: Any) -> None:
    data = make(grid=(8, 16, 16), heads=3, dim=64, sharp=0.05)
    index = torch.arange(2048)
    # Head 0 looks at its frame, head 1 at scattered blocks, head 2 at nothing in particular.
    frame = torch.eye(64).double()[index // 256]
    data.q[0, :, 0], data.k[0, :, 0] = 60 * frame, frame
    block = index // 64
    heavy = torch.isin(block, torch.tensor([3, 8, 17, 22, 30]))
    data.q[0, :, 1, 0], data.k[0, :, 1, 0] = 8.0, 5.0 * heavy
    found = kinds(data, Wanted(torch.full((3,), 0.2), lift=0.05))
    assert found.kind[0, 0] == GRID
    assert found.order[0].tolist()[0] == 1
    assert found.kind[0, 1] == VERTICAL_SLASH
    assert set(found.keep[0, 1, 1].nonzero()[:, 0].tolist()) >= {1, 3, 8, 17, 22, 30}
    assert found.kind[0, 2] != GRID
    squares = torch.block_diag(*[torch.ones(4, 4)] * 8).bool()
    assert found.keep[0, 0][squares].all()


def test_given_kinds_are_taken_as_they_are(make: Any) -> None:
    data = make(grid=(8, 16, 16), heads=4)
    wanted = Wanted(
        torch.tensor([0.3, 0.2, 0.4, 0.25]),
        0.05,
        torch.tensor([A_SHAPE, GRID, VERTICAL_SLASH, GRID]),
        torch.tensor([0, 0, 0, 2]),
        torch.tensor([[False] * 3, [True, True, True], [False] * 3, [False, False, True]]),
    )
    found = kinds(data, wanted)
    assert found.kind[0].tolist() == [A_SHAPE, GRID, VERTICAL_SLASH, GRID]
    assert found.order[0].tolist() == [0, 1, 0, 3]
    density = found.keep.double().mean((-1, -2))[0]
    # Lines of frames: own frame, the one of the phase, and its queries: 1/8 each, 3/8 - 2/64.
    assert density[1] == pytest.approx(3 / 8 - 2 / 64, abs=0.02)
    assert density[[0, 2, 3]].tolist() == pytest.approx([0.3, 0.4, 0.25], abs=0.02)
    phase = int(found.phase[0, 1])
    assert found.keep[0, 1, phase * 4 : phase * 4 + 4].all()
    assert found.keep[0, 1, :, phase * 4 : phase * 4 + 4].all()
