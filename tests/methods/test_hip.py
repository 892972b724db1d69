"""HiP without weights: what halving finds, and its order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.hip import HiP, morton_ordering


def along_a_line(make: Any, blocks: int, shift: float) -> Any:
    """Scores fall with the distance of the key from ``shift`` tokens after the query."""
    data = make(grid=(1, blocks, 64), heads=2, dim=2)
    angle = torch.arange(64 * blocks).double() / (64 * blocks) * 3.0
    for x, offset, size in ((data.q, shift / (64 * blocks) * 3.0, 30.0), (data.k, 0.0, 1.0)):
        x[0] = size * torch.stack([(angle + offset).cos(), (angle + offset).sin()], -1)[:, None]
    return data


@pytest.mark.parametrize(("blocks", "kept"), [(16, 4), (16, 3), (21, 5), (13, 1), (9, 8)])
def test_unimodal_scores_give_the_exact_top_blocks(make: Any, blocks: int, kept: int) -> None:
    # A little off the middle of a block, so that no two blocks are equally good.
    data, memory = along_a_line(make, blocks, 5.0), {}
    HiP(1 - kept / blocks, morton=False, warmup=0).attend(data.call(0, memory))
    keep = memory["mask"].dense()[0, 0]
    assert (keep.sum(-1) == kept).all()
    middle = torch.arange(blocks).double() * 64 + 32
    scores = []
    for p in range(blocks):
        rows = data.q[0, 64 * p : 64 * p + 64, 0]
        keys = data.k[0, middle.long(), 0]
        scores.append((rows @ keys.T).amax(0))
    own = torch.eye(blocks, dtype=torch.bool)
    best = torch.stack(scores).masked_fill(own, float("inf"))
    exact = best.argsort(-1, descending=True).argsort(-1) < kept
    assert torch.equal(keep, exact)


def test_monotone_scores_give_the_last_blocks(make: Any) -> None:
    data, memory = make(grid=(1, 16, 64), heads=1, dim=2), {}
    data.q[:] = torch.tensor([1.0, 0.0])
    data.k[..., 0] = torch.arange(1024).double()[None, :, None]
    HiP(0.75, morton=False, warmup=0).attend(data.call(0, memory))
    keep = memory["mask"].dense()[0, 0]
    for row in range(16):
        expected = {row} | set(range(15, 15 - (4 if row > 12 else 3), -1))
        assert set(keep[row].nonzero()[:, 0].tolist()) == expected


def test_ranges_of_every_size_reach_all_blocks(make: Any, plant: Any) -> None:
    # Every token of a block carries its axis, so representatives are no accident; one target a row
    # besides its own, anywhere. k = 8 of 16: one round of halving, in which no peak can hide.
    rng = torch.Generator().manual_seed(2)
    target = torch.rand(1, 2, 16, 16, generator=rng).argsort(-1) < 1
    data = plant(target, grid=(8, 8, 16))
    memory: dict[str, Any] = {}
    HiP(0.5, morton=False, warmup=0).attend(data.call(0, memory))
    keep = memory["mask"].dense()
    assert (keep.sum(-1) == 8).all()
    assert keep[target].all()


def test_parts_give_the_same_mask(make: Any, monkeypatch: Any) -> None:
    data, masks = make(grid=(5, 9, 21), text=5, batch=2), []
    for scratch in (1 << 26, 1):
        monkeypatch.setattr("dit_sparse.methods.hip._SCRATCH_ELEMENTS", scratch)
        memory: dict[str, Any] = {}
        HiP(0.7, warmup=0).attend(data.call(0, memory))
        masks.append(memory["mask"].dense())
    assert torch.equal(*masks)


def test_ranges_of_morton_order_are_boxes() -> None:
    layout = TokenLayout((8, 8, 8), 3, "text_video")
    order = morton_ordering(layout, torch.device("cpu"))
    assert torch.equal(order.perm[512:], torch.arange(3))
    coords = layout.coords()[order.perm[:512]]
    for size in (8, 16, 64, 128, 256):
        runs = coords.view(-1, size, 3)
        box = (runs.amax(1) - runs.amin(1) + 1).prod(-1)
        assert (box == size).all()
    ragged = TokenLayout((3, 5, 9))
    perm = morton_ordering(ragged, torch.device("cpu")).perm
    assert torch.equal(perm.sort().values, torch.arange(135))
