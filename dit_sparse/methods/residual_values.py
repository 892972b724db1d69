"""One residual: its arithmetic, its precision and its form in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that are computed at a time, so that fp32 intermediates stay small.
_CHUNK_ELEMENTS = 1 << 24
_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def _token_chunks(x: Tensor) -> list[slice]:
    tokens = x.shape[1]
    size = max(1, _CHUNK_ELEMENTS // max(1, x[:, :1].numel()))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


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
        cls, dense: Tensor, sparse: Tensor, factor: Tensor | None = None, precision: str = "native"
    ) -> Residual:
        """The residual of ``sparse``, in the tokens' order of both.

        Args:
            dense: Attention over all keys, ``[batch, tokens, heads, dim]``.
            sparse: Attention over the kept keys, same shape and dtype.
            factor: On the sparse output, ``[batch, tokens, heads, 1]``; None is 1.
            precision: See :class:`~dit_sparse.methods.residual_plan.ResidualOptions`.

        float8 rounds an element x by at most ``max(|x| / 16, amax / 448 / 1024)`` where amax is the
        largest absolute value of its token and head.
        """
        kept = {"native": dense.dtype, "bfloat16": torch.bfloat16}.get(precision)
        values = torch.empty(dense.shape, dtype=kept or torch.float8_e4m3fn, device=dense.device)
        scale = None
        if kept is None:
            scale = torch.empty(*dense.shape[:-1], 1, dtype=torch.float32, device=dense.device)
        work = torch.promote_types(dense.dtype, torch.float32)
        one = torch.ones((), dtype=work, device=dense.device)
        for part in _token_chunks(dense):
            by = one if factor is None else factor[:, part]
            missed = torch.addcmul(dense[:, part].to(work), by, sparse[:, part], value=-1)
            if scale is not None:
                largest = missed.abs().amax(-1, keepdim=True).float()
                # A row of zeros needs a scale too.
                row = (largest / _FLOAT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
                scale[:, part] = row
                missed = (missed / row).clamp(-_FLOAT8_MAX, _FLOAT8_MAX)
            values[:, part] = missed.to(values.dtype)
        return cls(values, scale)

    def read(self, index: tuple[slice | Tensor, ...]) -> Tensor:
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

    def replace(self, index: tuple[slice | Tensor, ...], part: Residual) -> None:
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
        self, sparse: Tensor, factor: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """``factor * sparse + weight * residual``, computed in fp32 and written into ``sparse``.

        Args:
            sparse: ``[batch, tokens, heads, dim]``.
            factor: ``[batch, tokens, heads, 1]``; None is 1.
            weight: ``[batch | 1, tokens, heads, 1]``; None is 1.
        """
        work = torch.promote_types(sparse.dtype, torch.float32)
        one = torch.ones((), dtype=work, device=sparse.device)
        for part in _token_chunks(sparse):
            values = self.values[:, part]
            if self.scale is not None:
                values = values.to(work) * self.scale[:, part]
            if weight is not None:
                values = values * weight[:, part].to(work)
            by = one if factor is None else factor[:, part]
            out = sparse[:, part]
            torch.addcmul(values, by.to(work), out, out=out)
        return sparse


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
