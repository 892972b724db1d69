"""One residual: its arithmetic, its precision and its form in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.residual import Index, add_residual, replace_residual
from dit_sparse.layout import Ordering

EVERYTHING: Index = (slice(None), slice(None), slice(None))


@dataclass(frozen=True, eq=False)
class Residual:
    """``dense - factor * sparse`` of one layer and branch.

    Attributes:
        values: ``[batch, tokens, heads, dim]``.
        scale: Factor on the values of each token and head, ``[batch, tokens, heads, 1]`` fp32, with
            values in float8; else None.
    """

    values: Tensor
    scale: Tensor | None = None

    @classmethod
    def between(
        cls,
        dense: Tensor,
        sparse: Tensor,
        factor: Tensor | None = None,
        precision: str = "native",
        impl: str = "auto",
    ) -> Residual:
        """The residual of ``sparse``, in the tokens' order of both.

        Args:
            dense: Attention over all keys, ``[batch, tokens, heads, dim]``.
            sparse: Attention over the kept keys, same shape and dtype.
            factor: On the sparse output, ``[batch, tokens, heads, 1]``; None is 1.
            precision: See :class:`~dit_sparse.methods.residual_plan.ResidualOptions`.
            impl: See :func:`~dit_sparse.kernels.residual.add_residual`.

        float8 rounds as :func:`~dit_sparse.kernels.residual.replace_residual` says.
        """
        kept = {"native": dense.dtype, "bfloat16": torch.bfloat16}.get(precision)
        values = torch.empty(dense.shape, dtype=kept or torch.float8_e4m3fn, device=dense.device)
        scale = None
        if kept is None:
            scale = torch.empty(*dense.shape[:-1], 1, dtype=torch.float32, device=dense.device)
        residual = cls(values, scale)
        residual.update(dense, sparse, factor=factor, impl=impl)
        return residual

    def update(
        self,
        dense: Tensor,
        sparse: Tensor,
        index: Index = EVERYTHING,
        factor: Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        """Replaces the residual of some tokens and heads by a fresh one.

        Args:
            dense: Attention over all keys of these tokens and heads alone.
            sparse: Attention over the kept keys of all tokens and heads.
            index: Of batch, tokens and heads, slices and at most one tensor of positions.
            factor: On the sparse output there, see :meth:`between`.
            impl: See :func:`~dit_sparse.kernels.residual.add_residual`.
        """
        replace_residual(self.values, self.scale, index, dense, sparse, factor=factor, impl=impl)

    def read(self, index: Index) -> Tensor:
        """The residual of some tokens and heads in fp32 (fp64 if it is kept so).

        Args:
            index: Of batch, tokens and heads, slices and at most one tensor of positions.
        """
        if self.scale is not None:
            # Indexed reads know no float8.
            values = self.values.view(torch.uint8)[index].view(self.values.dtype)
            return values.float() * self.scale[index]
        values = self.values[index]
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def replace(self, index: Index, part: Residual) -> None:
        """Writes another residual of the same precision over some tokens and heads.

        Args:
            index: Of batch, tokens and heads, slices and at most one tensor of positions.
            part: The residual there.
        """
        for target, source in ((self.values, part.values), (self.scale, part.scale)):
            if target is not None and source is not None:
                if target.dtype == torch.float8_e4m3fn:
                    # Indexed writes know no float8.
                    target, source = target.view(torch.uint8), source.view(torch.uint8)
                target[index] = source

    def add_to(
        self,
        sparse: Tensor,
        factor: Tensor | None = None,
        weight: Tensor | None = None,
        order: Ordering | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """``factor * sparse + weight * residual``, computed in fp32 and written into ``sparse``.

        Args:
            sparse: ``[batch, tokens, heads, dim]``.
            factor: ``[batch | 1, tokens | 1, heads | 1, 1]``; None is 1.
            weight: Same; None is 1.
            order: That both are in and that the result is brought out of; None leaves it.
            impl: See :func:`~dit_sparse.kernels.residual.add_residual`.
        """
        return add_residual(
            sparse, self.values, self.scale, factor=factor, weight=weight, order=order, impl=impl
        )


@dataclass(frozen=True, eq=False)
class HostResidual:
    """A :class:`Residual` in host memory, cut into pieces of flat uint8."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]


def pairs(residual: Residual, held: HostResidual) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Pieces of a residual on the device beside those in host memory."""
    on_device: list[Tensor] = []
    for tensor, pieces in ((residual.values, held.values), (residual.scale, held.scale)):
        if tensor is not None:
            flat = tensor.view(-1).view(torch.uint8)
            on_device += flat.split([piece.numel() for piece in pieces])
    return on_device, [*held.values, *held.scale]
