"""Grid heads: attention to tokens at equal distances, and the blocks that this makes.

Excess mass decides which stride a head has, and neither raw mass nor mass per key: raw mass grows
with the line, so it prefers divisors of the true stride; mass per key prefers its multiples. The
paper takes the phase and stride of the largest value and leaves open how the values of a class are
reduced to one.

Source: MMInference (arXiv 2504.16083), section 3.2, algorithms 4 and 5, table 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.methods.strides import TokenGroup

# Horizontal, vertical and slash lines of the grids that are looked for without a table. Horizontal
# ones, queries that look at everything, do not show in a sample of queries.
SOUGHT = ((False, True, False), (False, False, True), (False, True, True))


@dataclass(frozen=True, slots=True, eq=False)
class GridEvidence:
    """How much more attention the lines of every stride hold than their share of the pairs.

    Attributes:
        phase: The class of keys of largest excess, by stride: ``[batch, heads, strides]`` int64.
        excess: Of the vertical line (keys of that class), of the slash lines (pairs within a
            class), and of both together: ``[batch, heads, strides, 3]``.
    """

    phase: Tensor
    excess: Tensor


def grid_evidence(
    weights: Tensor, rows: Tensor, q_group: TokenGroup, k_group: TokenGroup
) -> GridEvidence:
    """Looks for the lines of every stride.

    Args:
        weights: ``[batch, heads, rows, n]`` over the video keys of ``k_group``, in its order of
            tokens; sums to 1 over its last two dimensions.
        rows: Places of the sampled queries among the video tokens of ``q_group``.
        q_group: The queries.
        k_group: The keys.
    """
    row_mass = weights.sum(-1)
    # One more column of nothing, for the gaps in the lists of members.
    columns = torch.nn.functional.pad(weights.sum(-2), (0, 1))
    phases, excess = [], []
    for stride, members in enumerate(k_group.members):
        residue, row_residue = k_group.residue[stride], q_group.residue[stride, rows]
        share = (members < k_group.video).sum(-1).to(weights.dtype) / k_group.video
        vertical, phase = (columns[..., members].sum(-1) - share).max(-1)
        within = (weights * (residue == row_residue[:, None])).sum(-1)  # [batch, heads, rows]
        above = within - row_mass * share[row_residue]
        slash = above.sum(-1)
        # Rows of that very class are on both lines.
        shared = (above * (row_residue == phase[..., None])).sum(-1)
        phases.append(phase)
        excess.append(torch.stack([vertical, slash, vertical + slash - shared], -1))
    return GridEvidence(torch.stack(phases, -1), torch.stack(excess, -2))


def affordable_excess(
    evidence: GridEvidence, q_group: TokenGroup, k_group: TokenGroup, budget: Tensor
) -> Tensor:
    """:attr:`GridEvidence.excess`, ``-inf`` for lines of more blocks than the budget.

    Args:
        evidence: Of the heads.
        q_group: The queries.
        k_group: The keys.
        budget: Blocks that a head may keep, ``[heads]``.
    """
    q_low, q_high, k_low, k_high = (
        x[1:] for x in (q_group.low, q_group.high, k_group.low, k_group.high)
    )
    at = evidence.phase[..., None]
    vertical = ((k_low <= at) & (at <= k_high)).sum(-1) * q_group.blocks
    meet = (q_low[..., None] <= k_high[:, None]) & (k_low[:, None] <= q_high[..., None])
    slash = meet.sum((-1, -2)).expand_as(vertical)
    # Both together are a little less than their sum where they cross.
    cost = torch.stack([vertical, slash, vertical + slash], -1)
    usable = torch.tensor(k_group.usable, device=at.device)
    affordable = (cost <= budget[:, None, None]) & usable[:, None]
    return evidence.excess.where(affordable, float("-inf"))


def grid_lines(
    q_group: TokenGroup, k_group: TokenGroup, order: Tensor, phase: Tensor, lines: Tensor
) -> Tensor:
    """Blocks on the lines of a grid, tokens in the order that gathers its classes.

    Args:
        q_group: The queries, in N_q blocks.
        k_group: The keys, in N_k blocks.
        order: Order of the tokens, 1 + the stride: ``[batch, heads]`` int64.
        phase: The class on the horizontal and vertical line, same shape.
        lines: Which lines there are: horizontal (all keys for the queries of the class), vertical
            (the keys of the class for all queries), slash (keys of the query's own class);
            ``[batch, heads, 3]`` bool.

    Returns:
        ``[batch, heads, N_q, N_k]`` bool. A block that holds one token of a line is on it.
    """
    q_low, q_high = q_group.low[order], q_group.high[order]  # [batch, heads, N_q]
    k_low, k_high = k_group.low[order], k_group.high[order]  # [batch, heads, N_k]
    at = phase[..., None]
    horizontal = ((q_low <= at) & (at <= q_high) & lines[..., :1])[..., None]
    vertical = ((k_low <= at) & (at <= k_high) & lines[..., 1:2])[..., None, :]
    meet = (q_low[..., None] <= k_high[..., None, :]) & (k_low[..., None, :] <= q_high[..., None])
    return horizontal | vertical | (meet & lines[..., 2:, None])
