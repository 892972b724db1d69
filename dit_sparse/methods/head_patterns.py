"""What a head attends to, estimated from a few of its rows, and the blocks to keep for it.

Every pattern is an order of the tokens and a *rank* of every block in that order; a head keeps the
blocks of lowest rank up to its budget. So all patterns of a head cost the same and compare at equal
density.

* A-shape: the first 128 tokens and a band around the diagonal that is as wide as the budget.
* Vertical-slash: the block columns and block diagonals of largest sampled mass.
* Grid: tokens in the order that gathers the classes of a stride. First its lines, see
  :mod:`~dit_sparse.methods.grid_heads`, then columns and diagonals as above.

Everything is over blocks and sampled rows; no matrix of all pairs of tokens is made.

Sources: MMInference (arXiv 2504.16083), section 3 and appendix C; MInference (arXiv 2407.02490) for
A-shape and vertical-slash.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.ops import work_dtype
from dit_sparse.methods.base import Call
from dit_sparse.methods.estimates import rank_of, scale_of
from dit_sparse.methods.grid_heads import SOUGHT, affordable_excess, grid_evidence, grid_lines
from dit_sparse.methods.pattern_table import A_SHAPE, GRID, VERTICAL_SLASH
from dit_sparse.methods.strides import TokenGroup

SINK_TOKENS = 128
# A diagonal that few sampled rows can reach counts as if this share of them did, so that one
# row alone cannot make it look heavy.
_LEAST_REACH = 0.125


def sampled_places(count: int, samples: int, device: torch.device) -> Tensor:
    """One place in each of ``samples`` equal strata of ``range(count)``, ``[<= samples]`` int64.

    Within its stratum a place moves by the golden ratio from one to the next, so that rows, columns
    and frames of a grid are all spread over. The paper samples the last 64 queries, which in a
    bidirectional model are nothing but the end of the last frame.
    """
    if count <= samples:
        return torch.arange(count, device=device)
    stratum = torch.arange(samples, dtype=torch.float64)
    place = (stratum + (stratum * 0.6180339887498949) % 1) * (count / samples)
    return place.long().to(device)


def sampled_attention(call: Call, rows: Tensor, heads: list[int]) -> Tensor:
    """Attention weights of some rows, as shares of all sampled attention.

    Args:
        call: The call; padded keys get no weight and padded rows do not count.
        rows: Positions of the queries in the sequence, ``[rows]`` int64.
        heads: Which heads, ascending.

    Returns:
        ``[batch, heads, rows, tokens]`` fp32 (fp64 for fp64 input) that sums to 1 over its last two
        dimensions.
    """
    work = work_dtype(call.q.dtype)
    # Runs of heads, which these nearly always are, are views.
    run = heads == list(range(heads[0], heads[-1] + 1))
    some = slice(heads[0], heads[-1] + 1) if run else heads
    queries = call.q[:, rows][:, :, some].transpose(1, 2).to(work)
    scores = scale_of(call) * queries @ call.k[:, :, some].permute(0, 2, 3, 1).to(work)
    if call.key_valid is None:
        return scores.softmax(-1) / len(rows)
    scores = scores.masked_fill(~call.key_valid[:, None, None], float("-inf"))
    counted = call.key_valid[:, rows].to(work)
    share = counted / counted.sum(-1, keepdim=True).clamp_min(1)
    weights = scores.softmax(-1) * share[:, None, :, None]
    return weights.where(share[:, None, :, None] > 0, 0.0)


def block_weights(weights: Tensor, order: Tensor, block: int, blocks: int) -> Tensor:
    """Sampled attention by key block, each head's keys in its own order.

    Args:
        weights: ``[batch, heads, rows, n]``.
        order: ``[batch, heads, n]``, places of the keys in order.
        block: Tokens in a block.
        blocks: How many blocks of video alone there are; a remainder is left out.

    Returns:
        ``[batch, heads, rows, blocks]``.
    """
    moved = weights.take_along_dim(order[:, :, None], -1)[..., : blocks * block]
    padded = torch.nn.functional.pad(moved, (0, blocks * block - moved.shape[-1]))
    return padded.unflatten(-1, (blocks, block)).sum(-1)


def line_ranks(weights: Tensor, place: Tensor, rows: int) -> Tensor:
    """Rank of every block by the heaviest block column or block diagonal through it.

    Args:
        weights: ``[batch, heads, sampled, kv_blocks]``, see :func:`block_weights`.
        place: Block of each sampled row, ``[batch, heads, sampled]``; those past the last are left
            out.
        rows: Query blocks.

    Returns:
        ``[batch, heads, rows, kv_blocks]`` int64 from 1. The main diagonal is always 1, so that no
        row of a square mask is empty.
    """
    columns = weights.shape[-1]
    diagonals = rows + columns - 1
    counted = (place < rows).to(weights.dtype)
    weights = weights * counted[..., None]
    column = torch.arange(columns, device=weights.device)
    # Where each sampled row meets each diagonal; gathered, since scattered sums of floats would
    # depend on the order of threads.
    meets = place[..., None] - torch.arange(diagonals, device=weights.device) + (columns - 1)
    inside = (meets >= 0) & (meets < columns) & (counted[..., None] > 0)
    mass = (weights.gather(-1, meets.clamp(0, columns - 1)) * inside).sum(-2)
    reach = inside.sum(-2) / counted.sum(-1, keepdim=True).clamp_min(1)
    slash = mass / reach.clamp_min(_LEAST_REACH)
    slash[..., columns - 1] = float("inf")
    rank = 1 + rank_of(torch.cat([weights.sum(-2), slash], -1))
    at = torch.arange(rows, device=rank.device)[:, None] - column + (columns - 1)
    return torch.minimum(rank[..., None, :columns], rank[..., columns + at])


def a_shape_ranks(q_group: TokenGroup, k_group: TokenGroup) -> Tensor:
    """Rank of every block by its distance from the queries' own place; the first tokens come first.

    The paper's A has half a band, keys before the query. Here queries look both ways.

    Args:
        q_group: The queries, N_q blocks.
        k_group: The keys, N_k blocks.

    Returns:
        ``[N_q, N_k]`` int64 from 1, tokens in order 0.
    """
    rows, columns, block = q_group.blocks, k_group.blocks, k_group.block
    middle = torch.arange(rows, device=q_group.rank.device) * block + block // 2
    own = torch.searchsorted(k_group.rank, q_group.rank[middle.clamp(max=q_group.video - 1)])
    column = torch.arange(columns, device=own.device)
    ahead = column - (own // block).clamp(max=columns - 1)[:, None]
    # One block more behind, then one more ahead: 1 for the own one, then 2, 3, ...
    ranks = torch.where(ahead > 0, 2 * ahead + 1, -2 * ahead).clamp(min=1)
    return ranks.where(column >= SINK_TOKENS // block, 1)


def cut(ranks: Tensor, budget: Tensor) -> Tensor:
    """The blocks of lowest rank, as near to a budget as whole ranks come.

    All blocks of rank 0 and 1 are kept: lines of a grid, and the diagonal, so that no row is empty.

    Args:
        ranks: ``[batch, heads, rows, columns]`` int64, 0 or more.
        budget: Blocks to keep, ``[heads]``.

    Returns:
        ``[batch, heads, rows, columns]`` bool.
    """
    batch, heads, rows, columns = ranks.shape
    flat = ranks.flatten(-2)
    # Ranks are those of columns and diagonals, of distances, and 0.
    count = flat.new_zeros(batch, heads, rows + 2 * columns).scatter_add_(
        -1, flat, torch.ones_like(flat)
    )
    kept = count.cumsum(-1)[..., 1:]
    last = 1 + (kept - budget[:, None]).abs().argmin(-1)
    return ranks <= last[..., None, None]


def recall(weights: Tensor, place: Tensor, keep: Tensor) -> Tensor:
    """Share of the sampled attention between blocks that a mask keeps, ``[batch, heads]``.

    Args:
        weights: As in :func:`line_ranks`.
        place: As in :func:`line_ranks`.
        keep: ``[batch, heads, rows, columns]`` bool.
    """
    counted = (place < keep.shape[-2])[..., None]
    at = place.clamp(max=keep.shape[-2] - 1)[..., None]
    rows = keep.take_along_dim(at, -2) & counted
    total = (weights * counted).sum((-1, -2))
    return (weights * rows).sum((-1, -2)) / total.clamp_min(1e-30)


class Wanted(NamedTuple):
    """What is given of each head's pattern; all but the density may be left to the estimate.

    Attributes:
        density: Share of the blocks to keep, ``[heads]``.
        lift: Excess from which a head is a grid head, where ``kind`` is None.
        kind: ``GRID``, ``VERTICAL_SLASH`` or ``A_SHAPE``, ``[heads]`` int64; or None.
        stride: Which stride, ``[heads]`` int64; read where the kind is a grid.
        lines: Horizontal, vertical and slash lines of a grid, ``[heads, 3]`` bool.
    """

    density: Tensor
    lift: float
    kind: Tensor | None = None
    stride: Tensor | None = None
    lines: Tensor | None = None


class Chosen(NamedTuple):
    """The pattern of each head.

    Attributes:
        kind: ``GRID``, ``VERTICAL_SLASH`` or ``A_SHAPE``, ``[batch, heads]`` int64.
        order: Order of the tokens, see :class:`TokenGroup`; same shape.
        phase: Class of the horizontal and vertical line of a grid; same shape.
        keep: Blocks between video tokens, ``[batch, heads, q_blocks, kv_blocks]`` bool.
    """

    kind: Tensor
    order: Tensor
    phase: Tensor
    keep: Tensor


def choose(
    weights: Tensor, rows: Tensor, q_group: TokenGroup, k_group: TokenGroup, wanted: Wanted
) -> Chosen:
    """The pattern of each head; without a given kind the one that holds most sampled attention.

    A grid has to show besides: on a head that looks at nothing in particular the fullest of many
    classes is still fuller than its share.

    Args:
        weights: ``[batch, heads, rows, n]`` over the video keys of ``k_group``, in its order of
            tokens; sums to 1 over its last two dimensions.
        rows: Places of the sampled queries among the video tokens of ``q_group``.
        q_group: The queries.
        k_group: The keys.
        wanted: What is given.
    """
    device, (batch, heads), block = weights.device, weights.shape[:2], q_group.block
    shape = q_group.blocks, k_group.blocks
    if 0 in shape:
        # So few tokens that every block of them has text: there is nothing to choose.
        none = torch.full((batch, heads), VERTICAL_SLASH, device=device)
        keep = torch.ones(batch, heads, *shape, dtype=torch.bool, device=device)
        return Chosen(none, torch.zeros_like(none), torch.zeros_like(none), keep)
    budget = wanted.density * (shape[0] * shape[1])
    evidence = grid_evidence(weights, rows, q_group, k_group)

    def lines_and_more(order: Tensor, phase: Tensor, lines: Tensor) -> tuple[Tensor, ...]:
        """The blocks kept in an order, and what is needed for their recall."""
        seen = block_weights(weights, k_group.orders[order], block, shape[1])
        place = q_group.place[order][..., rows]
        ranks = line_ranks(seen, place, shape[0])
        forced = grid_lines(q_group, k_group, order, phase, lines)
        return seen, place, cut(ranks.masked_fill(forced, 0), budget)

    a_shape = cut(a_shape_ranks(q_group, k_group).expand(batch, heads, *shape), budget)
    if wanted.kind is not None:
        assert wanted.stride is not None and wanted.lines is not None
        kind, stride, lines = (
            x.expand(batch, *x.shape) for x in (wanted.kind, wanted.stride, wanted.lines)
        )
        phase = evidence.phase.gather(-1, stride[..., None])[..., 0]
        order = torch.where(kind == GRID, 1 + stride, 0)
        _, _, keep = lines_and_more(order, phase, lines & (kind == GRID)[..., None])
    else:
        excess, best = affordable_excess(evidence, q_group, k_group, budget).flatten(-2).max(-1)
        stride, lines = best // len(SOUGHT), torch.tensor(SOUGHT, device=device)[best % len(SOUGHT)]
        phase = evidence.phase.gather(-1, stride[..., None])[..., 0]
        seen, place, grid = lines_and_more(1 + stride, phase, lines)
        as_grid = recall(seen, place, grid)
        seen, place, keep = lines_and_more(torch.zeros_like(stride), phase, lines & False)
        without, as_a = (recall(seen, place, other) for other in (keep, a_shape))
        kind = torch.where(as_a > without, A_SHAPE, VERTICAL_SLASH)
        shows = (excess >= wanted.lift) & (as_grid >= torch.maximum(without, as_a))
        kind = kind.masked_fill(shows, GRID)
        keep = torch.where(shows[..., None, None], grid, keep)
        order = torch.where(shows, 1 + stride, 0)
    keep = torch.where((kind == A_SHAPE)[..., None, None], a_shape, keep)
    return Chosen(kind, order, phase, keep)
