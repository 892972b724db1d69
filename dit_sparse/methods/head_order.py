"""An order of the tokens for every head by itself, for methods that sort tokens by content."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.methods.base import Call


@dataclass(frozen=True, slots=True, eq=False)
class HeadOrder:
    """One permutation of the tokens for every batch element and head.

    Attributes:
        perm: Position of each token of the new sequence in the given one,
            ``[batch, heads, tokens]`` int32, half of what int64 would hold between steps.
    """

    perm: Tensor

    @classmethod
    def by(cls, key: Tensor, call: Call) -> HeadOrder:
        """Video tokens by ascending ``key``, those of padding last; text stays where it is.

        All heads then have their padding in the same places. Equal keys keep their order.

        Args:
            key: Integers, not negative, ``[batch, heads, video]``.
            call: Tokens ordered video first.
        """
        video, tokens = call.layout.video, call.layout.tokens
        if call.key_valid is not None:
            last = torch.iinfo(key.dtype).max
            key = key.masked_fill(~call.key_valid[:, None, :video], last)
        first = key.argsort(dim=-1, stable=True)
        text = torch.arange(video, tokens, device=key.device).expand(*first.shape[:2], -1)
        return cls(torch.cat([first, text], -1).int())

    def apply(self, x: Tensor) -> Tensor:
        """``x`` ``[batch, tokens, heads, dim]`` in the new order."""
        return x.gather(1, self._index(x))

    def undo(self, x: Tensor) -> Tensor:
        """``x`` ``[batch, tokens, heads, dim]`` back in the given order."""
        return torch.empty_like(x).scatter_(1, self._index(x), x)

    def _index(self, x: Tensor) -> Tensor:
        return self.perm.transpose(1, 2).long().unsqueeze(-1).expand(x.shape)


def regroup(call: Call, queries: HeadOrder, keys: HeadOrder) -> Call:
    """``call`` with its queries in one order and its keys and values in another."""
    valid = call.key_valid
    if valid is not None:
        # As HeadOrder.by leaves it: what exists first, then padding, then text.
        video = call.layout.video
        place = torch.arange(video, device=valid.device)
        there = place < valid[:, :video].sum(-1, keepdim=True)
        valid = torch.cat([there, valid[:, video:]], -1)
    return replace(
        call, q=queries.apply(call.q), k=keys.apply(call.k), v=keys.apply(call.v), key_valid=valid
    )
