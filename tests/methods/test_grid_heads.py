"""Planted grids are found, anything else is not, and their lines are the pairs they should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.grid_heads import affordable_excess, grid_evidence, grid_lines
from dit_sparse.methods.head_patterns import sampled_attention, sampled_places
from dit_sparse.methods.strides import token_group

CPU = torch.device("cpu")
# Divisors and multiples of one another among them, so that the right one is not the only one.
STRIDES = ("hw", "w", "2w", "2hw", "t", "wt", "h", "th", "4", "12")
GRID = (8, 6, 8)


def evidence(data: Any, samples: int = 64) -> Any:
    group = token_group(data.layout, None, False, STRIDES, None, 64, CPU)
    rows = sampled_places(group.video, samples, CPU)
    heads = list(range(data.q.shape[2]))
    weights = sampled_attention(data.call(), group.tokens[rows], heads)
    return group, grid_evidence(weights[..., group.tokens], rows, group, group)


def plant_vertical(data: Any, head: int, chosen: Tensor, strength: float) -> None:
    """All queries of a head look at the chosen keys, each with ``exp(strength)`` times the rest."""
    dim = data.q.shape[-1]
    data.q[:, :, head, 0] = dim**0.5
    data.k[:, :, head, 0] = strength * chosen.to(data.k.dtype)


@pytest.mark.parametrize("strength", [3.0, 6.0])
@pytest.mark.parametrize("name", ["hw", "w", "2w", "t", "wt", "h", "th", "12"])
def test_planted_columns_are_found_with_stride_and_phase(
    make: Any, name: str, strength: float
) -> None:
    at = STRIDES.index(name)
    sigma = token_group(TokenLayout(GRID), None, False, STRIDES, None, 64, CPU).sigma[at]
    phases = [0, sigma // 2, sigma - 1]
    data = make(grid=GRID, heads=len(phases), sharp=0.5)
    group = token_group(data.layout, None, False, STRIDES, None, 64, CPU)
    for head, phase in enumerate(phases):
        plant_vertical(data, head, group.residue[at] == phase, strength)
    group, found = evidence(data)
    vertical = found.excess[0, ..., 0]
    # Classes of 48 and of 2 tokens differ in how much they can hold beside 384 keys at 1.
    assert vertical.argmax(-1).tolist() == [at] * len(phases)
    assert found.phase[0, :, at].tolist() == phases
    assert (vertical[:, at] > 0.05).all()


@pytest.mark.parametrize("name", ["hw", "w", "t", "wt", "h", "th"])
def test_planted_slash_lines_are_found(make: Any, name: str) -> None:
    at = STRIDES.index(name)
    data = make(grid=GRID, heads=1, dim=64, sharp=0.1)
    group = token_group(data.layout, None, False, STRIDES, None, 64, CPU)
    # A direction for each class; queries look along the direction of their own.
    rng = torch.Generator().manual_seed(1)
    axes = torch.nn.functional.normalize(
        torch.randn(group.sigma[at], 64, generator=rng).double(), dim=-1
    )
    data.k[0, :, 0] = axes[group.residue[at]]
    data.q[0, :, 0] = 8 * 12 * axes[group.residue[at]]
    group, found = evidence(data)
    flat = found.excess[0, 0].flatten().argmax()
    assert (int(flat) // 3, int(flat) % 3) == (at, 1)
    assert found.excess[0, 0, at, 1] > 0.5


def test_evidence_is_the_excess_of_the_sampled_mass(make: Any) -> None:
    data = make(grid=(4, 4, 6), batch=2, heads=2)
    group = token_group(data.layout, None, False, STRIDES, None, 64, CPU)
    rows = sampled_places(96, 24, CPU)
    weights = sampled_attention(data.call(), rows, [0, 1])
    torch.testing.assert_close(weights, data.softmax()[:, :, rows] / 24)
    found = grid_evidence(weights, rows, group, group)
    for k, sigma in enumerate(group.sigma):
        residue = group.residue[k]
        share = torch.stack([(residue == p).double().mean() for p in range(sigma)])
        mass = torch.stack([weights[..., residue == p].sum((-1, -2)) for p in range(sigma)], -1)
        vertical, phase = (mass - share).max(-1)
        assert torch.equal(found.phase[..., k], phase)
        torch.testing.assert_close(found.excess[..., k, 0], vertical)
        within = residue[rows][:, None] == residue
        slash = (weights * within).sum((-1, -2)) - share[residue[rows]].mean()
        torch.testing.assert_close(found.excess[..., k, 1], slash)
        for b in range(2):
            for h in range(2):
                union = within | (residue == phase[b, h])
                both = (weights[b, h] * union).sum() - union.double().mean()
                torch.testing.assert_close(found.excess[b, h, k, 2], both)


@pytest.mark.parametrize("planted", [False, True])
def test_flat_attention_and_shuffled_tokens_show_no_grid(make: Any, planted: bool) -> None:
    data = make(grid=(16, 16, 16), heads=2, sharp=0.02)
    group = token_group(data.layout, None, False, STRIDES, None, 64, CPU)
    if planted:
        for head, at in enumerate((1, 4)):
            plant_vertical(data, head, group.residue[at] == 1, 4.0)
        assert (evidence(data)[1].excess.amax((-1, -2)) > 0.5).all()
        shuffled = torch.randperm(4096, generator=torch.Generator().manual_seed(3))
        data.q, data.k = data.q[:, shuffled], data.k[:, shuffled]
    _, found = evidence(data, 128)
    # What chance gives the fullest of so many classes; the default lift is 0.05.
    assert found.excess.max() < (0.03 if planted else 0.002)


@pytest.mark.parametrize(
    ("grid", "name"), [((4, 32, 4), "w"), ((8, 16, 16), "t"), ((2, 64, 8), "w"), ((4, 8, 64), "h")]
)
def test_density_of_a_grid(grid: tuple[int, int, int], name: str) -> None:
    # Classes of whole blocks, so that block density is that of the pairs.
    group = token_group(TokenLayout(grid), None, False, (name,), None, 64, CPU)
    sigma = group.sigma[0]
    assert group.video // sigma % 64 == 0
    order = torch.ones(1, sigma, dtype=torch.int64)
    phase = torch.arange(sigma)[None]
    for flags, density in (
        ("h", 1 / sigma),
        ("v", 1 / sigma),
        ("s", 1 / sigma),
        ("hv", 2 / sigma - 1 / sigma**2),
        ("vs", 2 / sigma - 1 / sigma**2),
        ("hvs", 3 / sigma - 2 / sigma**2),
    ):
        lines = torch.tensor([line in flags for line in "hvs"]).expand(1, sigma, 3)
        keep = grid_lines(group, group, order, phase, lines)
        expected = torch.full((1, sigma), density)
        torch.testing.assert_close(keep.float().mean((-1, -2)), expected)


@pytest.mark.parametrize("name", ["hw", "w", "t", "th", "5"])
def test_blocks_on_a_line_are_those_that_hold_a_token_of_it(name: str) -> None:
    # Ragged: 231 tokens, classes of 3 to 77.
    group = token_group(TokenLayout((3, 7, 11)), None, False, (name,), None, 16, CPU)
    gathered = group.residue[0][group.orders[1]]
    padded = torch.nn.functional.pad(gathered, (0, -231 % 16), value=-1).view(-1, 16)
    order = torch.ones(1, group.sigma[0], dtype=torch.int64)
    phase = torch.arange(group.sigma[0])[None]
    for at, flags in enumerate(torch.eye(3).bool()):
        keep = grid_lines(group, group, order, phase, flags.expand(1, group.sigma[0], 3))[0]
        holds = (padded == phase[0, :, None, None]).any(-1)  # [phases, blocks]
        square = torch.stack([h[:, None] & h[None] for h in holds]).any(0)
        expected = (
            holds[:, :, None].expand_as(keep),
            holds[:, None].expand_as(keep),
            square.expand_as(keep),
        )[at]
        assert torch.equal(keep, expected)


def test_lines_above_the_budget_and_classes_of_one_are_no_candidates(make: Any) -> None:
    data = make(grid=(4, 16, 16), heads=2)
    group = token_group(data.layout, None, False, ("t", "hw", "1024"), None, 64, CPU)
    rows = sampled_places(1024, 64, CPU)
    weights = sampled_attention(data.call(), rows, [0, 1])
    found = grid_evidence(weights, rows, group, group)
    # Frames are 4 of 16 blocks: a vertical or slash line of one takes 64 of 256 blocks.
    cells = affordable_excess(found, group, group, torch.tensor([63.0, 64.0]))
    assert cells[0, 0, 0].tolist() == [float("-inf")] * 3
    assert torch.equal(cells[0, 1, 0, :2], found.excess[0, 1, 0, :2])
    assert cells[0, 1, 0, 2] == float("-inf")
    every = affordable_excess(found, group, group, torch.tensor([256.0, 256.0]))
    assert torch.equal(every[:, :, 0], found.excess[:, :, 0])
    # 256 places in 4 frames: a block holds 16 classes, so slash squares are the diagonal.
    assert every[0, 0, 1, 1].isfinite()
    assert (every[:, :, 2] == float("-inf")).all()
