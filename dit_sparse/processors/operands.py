"""Queries, keys and values as a method expects them, where a model's call is not of that form.

Three things differ between models: some attend from image queries alone, some start the image at
another place in each batch element, and some add token weights to the scores. Beside that, pieces
of a sequence may come together from several devices. Each is undone on the way out; dense outputs
go the way in, so that a method always sees one arrangement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.layout import Ordering, TokenLayout
from dit_sparse.processors.masks import fold_weights

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """One attention call.

    Attributes:
        q: Queries ``[batch, tokens, heads, dim]``.
        k: Keys ``[batch, tokens, heads, dim]``.
        v: Values, same shape.
        layout: What the tokens are.
        valid: Keys that are not padding, ``[batch, tokens]`` bool, or None.
        scale: Factor on the scores, or None for ``dim ** -0.5``.
        changes: (way in, way out) of an output, for each change made so far.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    valid: Tensor | None
    scale: float | None
    changes: tuple[tuple[Change, Change], ...] = ()

    def enter(self, out: Tensor) -> Tensor:
        """An output of the model's own call, arranged like these operands."""
        for way_in, _ in self.changes:
            out = way_in(out)
        return out

    def enter_with_lse(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """:meth:`enter`, and the row LSE where the rows are those of the model's own call."""
        return self.enter(out), None if self.changes else lse

    def leave(self, out: Tensor) -> Tensor:
        """An output for these operands, arranged as the model's call expects it."""
        for _, way_out in reversed(self.changes):
            out = way_out(out)
        return out

    def with_queries(self, start: int, count: int) -> Operands:
        """Zero queries for the ``count`` tokens from ``start`` on, which are keys only.

        Rows of attention do not depend on each other: the others stay what they are.
        """

        def way_in(x: Tensor) -> Tensor:
            zeros = x.new_zeros(x.shape[0], count, *x.shape[2:])
            return torch.cat([x[:, :start], zeros, x[:, start:]], 1)

        def way_out(x: Tensor) -> Tensor:
            return torch.cat([x[:, :start], x[:, start + count :]], 1)

        return replace(self, q=way_in(self.q), changes=(*self.changes, (way_in, way_out)))

    def rotated(self, starts: Sequence[int]) -> Operands:
        """Sequences rotated so that the grid, at ``starts`` in each batch element, comes first."""
        tokens = torch.arange(self.layout.tokens, device=self.q.device)
        first = torch.tensor(list(starts), device=self.q.device)[:, None]
        forth = (tokens + first) % self.layout.tokens
        back = (tokens - first) % self.layout.tokens

        def move(x: Tensor, order: Tensor) -> Tensor:
            index = order.view(*order.shape, *(1,) * (x.ndim - 2))
            return x.gather(1, index.expand_as(x))

        changes = (lambda x: move(x, forth), lambda x: move(x, back))
        q, k, v = (move(x, forth) for x in (self.q, self.k, self.v))
        valid = None if self.valid is None else move(self.valid, forth)
        return replace(self, q=q, k=k, v=v, valid=valid, changes=(*self.changes, changes))

    def ordered(self, order: Ordering | None) -> Operands:
        """The same with the tokens in another order, which is that of the layout."""
        if order is None:
            return self
        q, k, v = (order.apply(x) for x in (self.q, self.k, self.v))
        valid = None if self.valid is None else order.apply(self.valid)
        change = (order.apply, order.undo)
        return replace(self, q=q, k=k, v=v, valid=valid, changes=(*self.changes, change))

    def with_weights(self, weights: Tensor) -> Operands:
        """``w_i * w_j`` added to the score of every pair, see :func:`fold_weights`."""
        dim = self.q.shape[-1]
        scale = dim**-0.5 if self.scale is None else self.scale
        q, k, v = fold_weights(self.q, self.k, self.v, weights, scale)

        def way_in(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(*x.shape[:-1], q.shape[-1] - dim)], -1)

        changes = (way_in, lambda x: x[..., :dim])
        return replace(self, q=q, k=k, v=v, scale=scale, changes=(*self.changes, changes))
