"""MInference without weights: planted blocks, columns and diagonals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.minference import MInferenceBlock, MInferenceVS, line_mass


@pytest.mark.parametrize("tile", [None, (4, 4, 4)])
def test_planted_blocks_are_found(make: Any, plant: Any, tile: Any) -> None:
    rng = torch.Generator().manual_seed(1)
    wanted = torch.rand(2, 3, 8, 8, generator=rng).argsort(-1) < 2
    # A row's own block is kept in any case: plant it as one of the two.
    own = torch.eye(8, dtype=torch.bool)
    wanted = (wanted.double() + 2 * own).argsort(-1, descending=True).argsort(-1) < 2
    layout = make(grid=(4, 8, 16)).layout
    data = plant(wanted, layout.ordering(tile or (1, 1, 16)))
    memory: dict[str, Any] = {}
    MInferenceBlock(0.75, warmup=0, tile=tile).attend(data.call(0, memory))
    assert torch.equal(memory["mask"].dense(), wanted)


def test_the_score_is_the_product_of_means(make: Any) -> None:
    data, memory = make(grid=(4, 8, 20)), {}
    MInferenceBlock(0.7, warmup=0).attend(data.call(0, memory))
    means = [x.view(1, 10, 64, 2, 8).mean(2).transpose(1, 2) for x in (data.q, data.k)]
    score = means[0] @ means[1].mT
    score.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    expected = score.argsort(-1, descending=True).argsort(-1) < 3
    assert torch.equal(memory["mask"].dense(), expected)


def lines(heads: list[tuple[list[int], list[int]]], blocks: int) -> torch.Tensor:
    """Blocks on the given columns and diagonals (p - c) of each head."""
    place = torch.arange(blocks)
    offset = place[:, None] - place
    masks = []
    for columns, diagonals in heads:
        keep = offset == 0
        for column in columns:
            keep = keep | (place == column)
        for diagonal in diagonals:
            keep = keep | (offset == diagonal)
        masks.append(keep)
    return torch.stack(masks)[None]


@pytest.mark.parametrize("probes", [16, 64, 512])
def test_planted_columns_and_diagonals_are_found(plant: Any, probes: int) -> None:
    # One head of columns, one of diagonals to either side, one of both.
    wanted = lines([([2, 7], []), ([], [-3, 2]), ([5], [1])], 16)
    data = plant(wanted, grid=(8, 8, 16))
    for head in range(3):
        one, memory = data.heads(torch.tensor([head])), {}
        share = float(wanted[0, head].double().mean())
        MInferenceVS(1 - share, probes, warmup=0).attend(one.call(0, memory))
        assert torch.equal(memory["mask"].dense()[0, 0], wanted[0, head])


def test_lines_are_taken_until_the_budget_is_full(make: Any) -> None:
    data = make(grid=(8, 8, 16), heads=3)
    for sparsity in (0.3, 0.5, 0.8):
        memory: dict[str, Any] = {}
        MInferenceVS(sparsity, warmup=0).attend(data.call(0, memory))
        keep = memory["mask"].dense()[0]
        budget = round((1 - sparsity) * 16 * 16)
        # At least the budget, and by less than one line more.
        assert ((keep.sum((-1, -2)) >= budget) & (keep.sum((-1, -2)) < budget + 16)).all()
        place = torch.arange(16)
        for head in keep:
            covered = head.all(0) | torch.zeros(16, dtype=torch.bool)
            kept = [o for o in range(-15, 16) if head.diagonal(-o).all()]
            offset = place[:, None] - place
            union = covered | torch.isin(offset, torch.tensor(kept))
            assert torch.equal(head, union)


def test_line_mass_sums_columns_and_diagonals() -> None:
    mass = torch.tensor([[[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]]])
    vertical, slash = line_mass(mass, torch.tensor([0, 2]))
    assert vertical.tolist() == [[[11.0, 22.0, 33.0]]]
    # Offsets p - c from -2 to 2.
    assert slash.tolist() == [[[3.0, 2.0, 31.0, 20.0, 10.0]]]
