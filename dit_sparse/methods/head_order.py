"""An order of the tokens for every head by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.methods.base import Call


@dataclass(frozen=True, slots=True, eq=False)
class HeadOrder:
    """An order of the tokens, or of some of them, for every batch element and head.

    Attributes:
        perm: Position of each token of the new sequence in the given one, none twice,
            ``[batch, heads, chosen]`` int32, half of what int64 would hold between steps.
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
        """``x [batch, tokens, heads, dim]`` in this order: ``[batch, chosen, heads, dim]``."""
        batch, tokens, heads, dim = x.shape
        chosen = x.reshape(-1, dim).index_select(0, self._rows(tokens))
        return chosen.view(batch, -1, heads, dim)

    def undo(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x [batch, chosen, heads, dim]`` back in the given order.

        Args:
            x: In this order.
            out: Where to put it, ``[batch, tokens, heads, dim]`` contiguous; tokens that were not
                chosen keep their values. None where all are chosen.
        """
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        rows = self._rows(out.shape[1])
        out.view(-1, out.shape[-1]).index_copy_(0, rows, x.reshape(-1, x.shape[-1]))
        return out

    def undo_lse(self, lse: Tensor, out: Tensor) -> Tensor:
        """:meth:`undo` of ``lse [batch, heads, chosen]`` into ``out [batch, heads, tokens]``."""
        return out.scatter_(2, self.perm.long(), lse)

    def _rows(self, tokens: int) -> Tensor:
        """The chosen tokens as rows of the matrix ``[batch * tokens * heads, dim]``."""
        batch, heads, _ = self.perm.shape
        element = torch.arange(batch, device=self.perm.device)[:, None, None]
        head = torch.arange(heads, device=self.perm.device)
        return ((element * tokens + self.perm.transpose(1, 2)) * heads + head).flatten()


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
