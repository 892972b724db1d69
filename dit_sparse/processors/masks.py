"""What a model's own attention mask says, in the two forms that sparse attention computes with.

Padding becomes key validity. Three families hand their processors a *floating-point* product of
0/1 token weights, which attention adds to the scores: no token is excluded, pairs of real tokens
merely get one more in the exponent. That is reproduced and not repaired, through one extra head
dimension, because sparse attention must compute what the model computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout

# Models write "not this key" as -10000 or lower; after softmax its weight is 0 in every dtype.
EXCLUDED = -5000.0


@dataclass(frozen=True, slots=True, eq=False)
class MaskReading:
    """A mask, read.

    Attributes:
        valid: Keys that are not padding, ``[batch, tokens]`` bool, or None for all.
        weights: Token weights w, ``[batch, tokens]`` floating point: the model adds
            ``w_i * w_j`` to the score of the pair (i, j). None if it adds nothing.
    """

    valid: Tensor | None = None
    weights: Tensor | None = None


def read_mask(
    mask: Tensor | None,
    batch: int,
    layout: TokenLayout,
    name: str,
    outer: bool = False,
    penalty: bool = False,
) -> MaskReading:
    """Reads the mask that a processor passes to its attention call.

    Args:
        mask: None; bool ``[batch, 1, 1, tokens]``, also expanded over heads and queries, or
            ``[batch, tokens]``; floating point
            ``[batch, heads, 1, tokens]`` holding 0 and penalties below -5000; or, where ``outer``,
            ``[batch, 1, tokens, tokens]``.
        batch: Batch size of the queries.
        layout: What the tokens are.
        name: Of the layer, for the error.
        outer: Whether the family is known to build square masks as products of token weights
            (or as "same segment"), so that every image query has the same row.
        penalty: Whether the family is known to write 0 for a key and -10000 for padding.

    Raises:
        NotImplementedError: On any other mask.
    """
    if mask is None:
        return MaskReading()
    tokens, shape = layout.tokens, tuple(mask.shape)
    if shape[-1] == tokens and mask.ndim == 2 and mask.dtype == torch.bool:
        return MaskReading(valid=mask.expand(batch, -1))
    if mask.ndim == 4:
        # Expanded dimensions have stride 0: one row in memory, whatever the shape says.
        heads, queries = (1 if mask.stride(axis) == 0 else shape[axis] for axis in (1, 2))
        mask = mask[:, :heads, :queries]
        shape = tuple(mask.shape)
    if shape[-1] == tokens and mask.ndim == 4 and shape[2] == 1:
        if mask.dtype == torch.bool and shape[1] == 1:
            return MaskReading(valid=mask[:, 0, 0].expand(batch, -1))
        if penalty and mask.is_floating_point():
            # One penalty a key, repeated over heads by Attention.prepare_attention_mask.
            return MaskReading(valid=mask[:, 0, 0].expand(batch, -1) > EXCLUDED)
    if outer and mask.ndim == 4 and shape[2:] == (tokens, tokens):
        row = mask[:, 0, layout.video_start].expand(batch, -1)
        return MaskReading(valid=row) if mask.dtype == torch.bool else MaskReading(weights=row)
    raise NotImplementedError(
        f"{name}: sparse attention takes a padding mask, bool [batch, 1, 1, tokens], got "
        f"{mask.dtype} {shape}"
    )


def fold_weights(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with one more head dimension that adds ``w_i * w_j`` to the scores.

    ``scale * (q_i . k_j + w_i * w_j / scale)``; padded with zeros to a multiple of 8, which values
    get too, so that the output's first dimensions are the wanted ones.
    """
    batch, tokens, heads, dim = q.shape
    extra = q.new_zeros(batch, tokens, heads, 8 - dim % 8)
    q_extra, k_extra = extra.clone(), extra.clone()
    column = weights.to(q.dtype)[:, :, None]
    q_extra[..., 0] = column
    k_extra[..., 0] = column / scale
    return (
        torch.cat([q, q_extra], -1),
        torch.cat([k, k_extra], -1),
        torch.cat([v, extra], -1),
    )
