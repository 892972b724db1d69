"""Density of each head in three levels, by how much it needs the summaries of skipped blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def compensation_size(compensated: Tensor, dropped: Tensor) -> Tensor:
    """``|O_compensated - O_dropped| / |O_dropped|`` of each head, ``[batch, heads]`` fp32.

    Of all signals that need no dense attention this one ranks heads best by the error of what they
    drop.

    Args:
        compensated: Sparse attention with summaries, ``[batch, tokens, heads, dim]``.
        dropped: Under the same mask without, same shape.
    """
    dropped = dropped.float()
    added = (compensated.float() - dropped).square().sum((1, 3))
    return (added / dropped.square().sum((1, 3)).clamp_min(1e-30)).sqrt()


def spread(count: int, blocks: int) -> int:
    """Blocks by which the outer levels differ from ``count`` of ``blocks``: half, within bounds."""
    return max(0, min(count // 2, count - 1, blocks - count))


def level_counts(size: Tensor, count: int, blocks: int) -> Tensor:
    """Key blocks that each head keeps, ``[batch, heads]`` int64; the mean is ``count``.

    The third of the heads with the largest ``size`` keep half as many again, the third with the
    smallest half as many.

    Args:
        size: From :func:`compensation_size`.
        count: Key blocks of a head on average.
        blocks: Key blocks that there are.
    """
    heads = size.shape[-1]
    # Equal sizes keep head order, so that ties are deterministic.
    rank = size.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    outer = heads // 3
    level = (rank < outer).long() - (rank >= heads - outer).long()
    return torch.full_like(level, count) + level * spread(count, blocks)
