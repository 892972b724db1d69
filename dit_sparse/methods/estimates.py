"""Cheap statistics of an attention map by blocks, and choices by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels import ops
from dit_sparse.kernels.ops import work_dtype
from dit_sparse.mask import PackedMask, block_count, block_sizes
from dit_sparse.methods.base import Call, video_blocks

# Scores that :func:`probe_mass` holds at a time.
_SCRATCH_ELEMENTS = 1 << 26


def kept_count(sparsity: float, blocks: int) -> int:
    """``round((1 - s) N)`` of N blocks, never 0."""
    return max(1, round((1 - sparsity) * blocks))


def rank_of(scores: Tensor) -> Tensor:
    """Place of every entry along the last dimension, 0 for the largest; ties in given order."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def best_blocks(call: Call, scores: Tensor, sparsity: float, block: int) -> PackedMask:
    """The best-scored video blocks of every row, its own first, and everything with text.

    Args:
        call: Tokens ordered video first.
        scores: ``[batch | 1, heads | 1, blocks, blocks]`` of video, not negative, 0 where no key
            exists.
        sparsity: Share of video blocks that a row skips.
        block: Tokens in a block.
    """
    blocks = scores.shape[-1]
    own = torch.eye(blocks, dtype=torch.bool, device=scores.device)
    # A block of padding alone is not worth a place, not even as a row's own.
    scores = scores.masked_fill(own & (scores > 0), float("inf"))
    text = block_count(call.layout.tokens, block) - blocks
    scores = torch.nn.functional.pad(scores, (0, text, 0, text))
    most = kept_count(sparsity, blocks)
    count = torch.full((1, 1), most, device=scores.device)
    return call.top_blocks(scores, count, block, most).mask


def as_mass(scores: Tensor) -> Tensor:
    """``scores`` moved above 0, row by row, in the same order; -inf becomes 0."""
    there = scores > float("-inf")
    least = scores.masked_fill(~there, float("inf")).amin(-1, keepdim=True)
    return (scores - least + 1).where(there, 0.0)


def top_share(mass: Tensor, share: float) -> Tensor:
    """The fewest entries along the last dimension that hold ``share`` of the sum, bool.

    A share of 1 keeps every entry, those of no mass too.

    Args:
        mass: Not negative, ``[..., entries]``.
        share: In [0, 1].
    """
    if share >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    ranked, order = mass.sort(dim=-1, descending=True, stable=True)
    # An entry is needed as long as those before it do not reach the share.
    before = ranked.cumsum(-1) - ranked
    needed = before < share * mass.sum(-1, keepdim=True)
    return torch.zeros_like(needed).scatter_(-1, order, needed)


def block_means(x: Tensor, block: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of every block over the tokens that exist.

    Args:
        x: ``[batch, tokens, heads, dim]``.
        block: Tokens in a block; the last one may be ragged.
        valid: Tokens that exist, ``[batch, tokens]`` bool; the others may hold NaN.

    Returns:
        Means ``[batch, heads, blocks, dim]`` fp32 (fp64 for fp64), 0 where no token exists, and
        how many tokens exist, ``[batch | 1, blocks]``.
    """
    work = work_dtype(x.dtype)
    tokens = x.shape[1]
    whole = tokens // block * block
    if valid is None:
        count = block_sizes(tokens, block, x.device)[None].to(work)
    else:
        x = x.masked_fill(~valid[..., None, None], 0)
        count = torch.nn.functional.pad(valid, (0, -tokens % block))
        count = count.view(x.shape[0], -1, block).sum(-1).to(work)
    sums = x[:, :whole].unflatten(1, (-1, block)).sum(2, dtype=work)
    if whole < tokens:
        sums = torch.cat([sums, x[:, whole:].sum(1, keepdim=True, dtype=work)], 1)
    return (sums / count.clamp(min=1)[..., None, None]).transpose(1, 2), count


def pooled_scores(call: Call, block: int) -> Tensor:
    """``scale * qbar_p . kbar_c`` of video blocks, ``[batch, heads, blocks, blocks]``.

    Key blocks without a key that exists score -inf.
    """
    video = video_blocks(call.layout, block)
    tokens = min(video * block, call.layout.video)
    valid = None if call.key_valid is None else call.key_valid[:, :tokens]
    queries, _ = block_means(call.q[:, :tokens], block, valid)
    keys, count = block_means(call.k[:, :tokens], block, valid)
    scores = scale_of(call) * (queries @ keys.mT)
    return scores.masked_fill((count == 0)[:, None, None], float("-inf"))


def video_mass(call: Call, queries: Tensor, keys: Tensor, block: int) -> Tensor:
    """Attention mass of video blocks, ``[batch, heads, blocks, blocks]``, by all video and text.

    Two passes over queries and keys. Queries of padding hold none.

    Args:
        call: Tokens ordered video first.
        queries: ``call.q`` or some of its channels, which are scaled as all of them are.
        keys: ``call.k``, or the same channels.
        block: Tokens in a block.
    """
    options: dict[str, Any] = {
        "key_valid": call.key_valid,
        "scale": scale_of(call),
        "impl": call.impl,
    }
    lse = ops.row_lse(queries, keys, **options)
    if call.key_valid is not None:
        lse = lse.masked_fill(~call.key_valid[:, None], float("-inf"))
    blocks = video_blocks(call.layout, block)
    return ops.block_mass(queries, keys, lse, block, **options)[..., :blocks, :blocks]


def scale_of(call: Call) -> float:
    """The factor on the scores."""
    return call.q.shape[-1] ** -0.5 if call.scale is None else call.scale


def probe_rows(call: Call, count: int, block: int) -> Tensor:
    """Positions of ``count`` queries of video blocks, evenly spaced, ``[count]`` int64.

    Language models probe with the last queries, because those see all keys. Here all do, and every
    frame and region should have a say.
    """
    tokens = min(video_blocks(call.layout, block) * block, call.layout.video)
    count = min(count, tokens)
    return (torch.arange(count, device=call.q.device) * 2 + 1) * tokens // (2 * count)


def probe_mass(call: Call, rows: Tensor, block: int) -> Tensor:
    """Attention of single queries, summed over key blocks.

    Args:
        call: Tokens ordered video first.
        rows: Positions of the queries, ``[rows]``.
        block: Tokens in a key block.

    Returns:
        ``[batch, heads, rows, kv_blocks]`` fp32 (fp64 for fp64), text blocks included; a row sums
        to 1, or to 0 where the query itself is padding.
    """
    work = work_dtype(call.q.dtype)
    queries = call.q.index_select(1, rows)
    alive = None
    if call.key_valid is not None:
        alive = call.key_valid.index_select(1, rows)
        queries = queries.masked_fill(~alive[..., None, None], 0)
    lse = ops.row_lse(
        queries, call.k, key_valid=call.key_valid, scale=call.scale, impl=call.impl
    )  # [batch, heads, rows]
    queries = queries.transpose(1, 2).to(work)
    batch, heads, count, _ = queries.shape
    step = max(1, _SCRATCH_ELEMENTS // (batch * heads * count * block)) * block
    parts = []
    for start in range(0, call.k.shape[1], step):
        keys = call.k[:, start : start + step]
        weights = scale_of(call) * (queries @ keys.permute(0, 2, 3, 1).to(work))
        weights = weights.sub_(lse.unsqueeze(-1)).exp_()
        if call.key_valid is not None:
            there = call.key_valid[:, None, None, start : start + step]
            weights = weights.masked_fill(~there, 0.0)
        weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % block))
        parts.append(weights.unflatten(-1, (-1, block)).sum(-1))
    mass = torch.cat(parts, -1)
    return mass if alive is None else mass.masked_fill(~alive[:, None, :, None], 0.0)
