"""Dense attention over the tokens that exist, without a mask.

A mask sends scaled_dot_product_attention to its slow path, and most fast backends refuse one. Where
the mask only says which tokens are padding, the padding can be cut off instead: the remaining
queries see exactly the same keys. Outputs of padding rows are 0. Nothing reads them: padding is
excluded as a key in every layer, everything between the layers works token by token, and models
return their image tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def kept_tokens(valid: Tensor) -> list[slice | Tensor]:
    """The valid tokens of each batch element, as a slice where they are the first ones.

    Args:
        valid: ``[batch, tokens]`` bool. Read back from the device, so call this once a forward
            pass.
    """
    kept: list[slice | Tensor] = []
    for row in valid.cpu():
        count = int(row.sum())
        prefix = bool(row[:count].all())
        kept.append(slice(0, count) if prefix else row.nonzero().flatten().to(valid.device))
    return kept


def attend_kept(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[slice | Tensor]
) -> Tensor:
    """``attention`` over the kept tokens of each batch element; rows of the others are 0.

    Args:
        attention: Dense attention of ``[batch, tokens, heads, dim]`` tensors.
        q: Queries ``[batch, tokens, heads, dim]``; where there are fewer than keys they are all
            kept.
        k: Keys ``[batch, tokens, heads, dim]``.
        v: Values, same shape.
        kept: From :func:`kept_tokens` of the keys.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # One call for the batch where all elements are as long.
    is_even = all(isinstance(part, slice) and part == kept[0] for part in kept)
    for i, keys in enumerate(kept[:1] if is_even else kept):
        element = slice(None) if is_even else slice(i, i + 1)
        rows = keys if q.shape[1] == k.shape[1] else slice(None)
        out[element, rows] = attention(q[element, rows], k[element, keys], v[element, keys])
    return out
