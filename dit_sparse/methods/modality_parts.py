"""Attention in parts: queries and keys grouped by modality, every head's tokens in its own order.

Where the border of two modalities matters to a head (MMInference, arXiv 2504.16083, section 3.3):

* ``"none"``: nowhere. All tokens are one sequence (the paper's No- and K-boundary).
* ``"q"``: on the side of the queries. Those of each modality have a pattern of their own over all
  keys (Q-boundary, algorithm 2).
* ``"2d"``: on both. Each pair of modalities has its pattern, and the parts of a row share one
  softmax (2D-boundary, algorithms 3 and 7, which carry it through the loop over key modalities;
  here parts are merged by their log-sum-exp).

Text is not among these modalities: it is seen by and sees everything, so it rides along behind the
first group of queries and of keys. With video and text alone all three are therefore the same, and
one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dit_sparse.kernels import ops
from dit_sparse.kernels.ops import Attended
from dit_sparse.layout import TokenLayout
from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call
from dit_sparse.methods.head_order import HeadOrder
from dit_sparse.methods.strides import Ranges, TokenGroup

BOUNDARIES = ("none", "q", "2d")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One launch: some heads' queries of one group over their keys of another.

    Attributes:
        queries: The queries.
        keys: The keys.
        heads: Indices of the heads, int64, or None for all.
        kind: What was chosen for each head, an index into ``pattern_table.KINDS``;
            ``[batch, heads]`` int64.
        order: Order of the tokens, see :class:`TokenGroup`; same shape.
        phase: Class of the horizontal and vertical grid line; same shape, meaningless without.
        mask: The blocks kept, in that order.
    """

    queries: TokenGroup
    keys: TokenGroup
    heads: Tensor | None
    kind: Tensor
    order: Tensor
    phase: Tensor
    mask: PackedMask


# By (boundary, key group, query group), parts of one boundary and key group next to each other.
Parts = dict[tuple[str, int, int], Part]


def check_modalities(modalities: object) -> None:
    """Refuses what :func:`modality_ranges` cannot read.

    Raises:
        ValueError: If it is not a tuple of tuples of disjoint (start, stop).
    """
    spans = []
    try:
        for ranges in modalities:  # type: ignore[attr-defined]
            for start, stop in ranges:
                if type(start) is not int or type(stop) is not int or not 0 <= start < stop:
                    raise TypeError
                spans.append((start, stop))
    except (TypeError, ValueError):
        raise ValueError(
            "modalities must hold for each modality a tuple of token ranges (start, stop), such "
            f"as (((0, 1350),), ((1350, 2700), (4050, 5400))), got {modalities!r}"
        ) from None
    for (_, stop), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if start < stop:
            raise ValueError(f"modalities must not overlap, got {modalities!r}")


def modality_ranges(
    modalities: tuple[Ranges, ...] | None, layout: TokenLayout
) -> tuple[Ranges | None, ...]:
    """The modalities of the video tokens; what no range covers is one more, the last.

    Args:
        modalities: Token ranges (start, stop) in the model's order, for each modality; None or ()
            for video alone.
        layout: The sequence.

    Raises:
        ValueError: If a range ends past the sequence.
    """
    if not modalities:
        return (None,)
    longest = max(stop for ranges in modalities for _, stop in ranges)
    if longest > layout.tokens:
        raise ValueError(
            f"modalities must end within the {layout.tokens} tokens of this sequence, got a range "
            f"to {longest}; they are counted in tokens and depend on the size of the video"
        )
    position = torch.arange(layout.video_start, layout.video_start + layout.video)
    free = torch.ones_like(position, dtype=torch.bool)
    found: list[Ranges | None] = []
    for ranges in modalities:
        inside = torch.zeros_like(free)
        for start, stop in ranges:
            inside |= (position >= start) & (position < stop)
        if inside.any():
            found.append(ranges)
        free &= ~inside
    if free.any():
        edge = torch.nn.functional.pad(free.int(), (1, 1)).diff()
        starts, stops = ((edge == sign).nonzero()[:, 0] + layout.video_start for sign in (1, -1))
        found.append(tuple(zip(starts.tolist(), stops.tolist(), strict=True)))
    return tuple(found) if len(found) > 1 else (None,)


def head_order(
    group: TokenGroup, order: Tensor, key_valid: Tensor | None
) -> tuple[HeadOrder, Tensor | None]:
    """The tokens of a group in the order of each head.

    Padded video tokens go behind the others, so that the padding of all heads is in one place,
    which is what kernels take. (Padded text already is.)

    Args:
        group: The tokens.
        order: ``[batch, heads]``.
        key_valid: Keys that exist, ``[batch, tokens]`` bool, or None.

    Returns:
        The ordering, and which of its keys exist: ``[batch, size]`` bool, or None.
    """
    places = group.orders[order]
    batch, heads, count = places.shape
    valid = None
    if key_valid is not None:
        valid = key_valid[:, group.tokens]
        live = valid[:, None, :count].expand(-1, heads, -1).gather(-1, places)
        front, back = live.cumsum(-1), (~live).cumsum(-1)
        target = torch.where(live, front - 1, front[..., -1:] + back - 1)
        places = torch.empty_like(places).scatter_(-1, target, places)
        present = torch.arange(count, device=places.device) < valid[:, :count].sum(-1, keepdim=True)
        valid = torch.cat([present, valid[:, count:]], -1)
    text = torch.arange(count, group.size, device=places.device).expand(batch, heads, -1)
    perm = group.tokens[torch.cat([places, text], -1)]
    return HeadOrder(perm.int()), valid


def attend_side(call: Call, parts: Sequence[Part]) -> Attended:
    """Attention over the keys of one group.

    Args:
        call: The call.
        parts: Of the same heads, one a query group.

    Returns:
        Of those heads, in the model's order of tokens; queries of no part are undefined.
    """
    heads = parts[0].heads
    q, k, v = (x if heads is None else x.index_select(2, heads) for x in (call.q, call.k, call.v))
    batch, tokens, count, _ = q.shape
    result: Attended | None = None
    for part in parts:
        q_order, valid = head_order(part.queries, part.order, call.key_valid)
        k_order = q_order
        if part.keys is not part.queries:
            k_order, valid = head_order(part.keys, part.order, call.key_valid)
        attended = ops.attention(
            q_order.apply(q),
            k_order.apply(k),
            k_order.apply(v),
            part.mask,
            key_valid=valid,
            scale=call.scale,
            precision=call.precision,
            impl=call.impl,
            on_choice=call.kernels.append,
        )
        if result is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            lse = attended.lse.new_empty(batch, count, tokens)
            result = Attended(out, lse)
        q_order.undo(attended.out, result.out)
        q_order.undo_lse(attended.lse, result.lse)
    assert result is not None
    return result


def attend_parts(call: Call, parts: Parts) -> Tensor:
    """Attention ``[batch, tokens, heads, dim]`` in the model's order.

    Args:
        call: The call; its tokens in the model's order.
        parts: For every head the parts of one boundary, which hold every pair of tokens once.
    """
    whole: Tensor | None = None
    for _, same_heads in groupby(parts.items(), lambda item: item[0][0]):
        total: Attended | None = None
        for _, same_keys in groupby(same_heads, lambda item: item[0][1]):
            side = [part for _, part in same_keys]
            attended = attend_side(call, side)
            total = attended if total is None else ops.merge(total, attended)
        assert total is not None
        if side[0].heads is None:
            return total.out
        whole = torch.empty_like(call.q) if whole is None else whole
        whole.index_copy_(2, side[0].heads, total.out)
    assert whole is not None
    return whole


def parts_density(parts: Parts, heads: int, tokens: int) -> Tensor:
    """Kept over all pairs of tokens, ``[batch, heads]`` fp32."""
    first = next(iter(parts.values())).mask.head_density
    density = first.new_zeros(first.shape[0], heads)
    for part in parts.values():
        share = part.mask.head_density * (part.queries.size * part.keys.size / tokens**2)
        if part.heads is None:
            density += share
        else:
            density.index_add_(1, part.heads, share)
    return density
