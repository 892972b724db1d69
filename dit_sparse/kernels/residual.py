"""Adding a kept residual to sparse attention, and replacing a part of it.

Both are sums over ``[batch, tokens, heads, dim]``; what they cost is memory traffic and launches.
On CUDA each is one Triton kernel that reads and writes everything once
(:mod:`dit_sparse.kernels.triton_residual`), elsewhere a few PyTorch operations.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from dit_sparse.layout import Ordering

# Elements that are computed at a time, so that fp32 intermediates stay small.
_CHUNK_ELEMENTS = 1 << 24
_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
# Positions of batch, tokens and heads: slices and at most one tensor.
Index = tuple[slice | Tensor, ...]


def add_residual(
    sparse: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    *,
    factor: Tensor | None = None,
    weight: Tensor | None = None,
    order: Ordering | None = None,
    impl: str = "auto",
) -> Tensor:
    """``factor * sparse + weight * scale * values``, computed in fp32 (fp64 for fp64 input).

    Args:
        sparse: ``[batch, tokens, heads, dim]``; overwritten.
        values: Same shape, contiguous; the dtype of ``sparse``, bfloat16 or float8 (e4m3).
        scale: Of float8 values, ``[batch, tokens, heads, 1]`` fp32.
        factor: ``[batch | 1, tokens | 1, heads | 1, 1]``; None is 1.
        weight: Same; None is 1.
        order: That the tokens are in; the result is in the order before it. None leaves them.
        impl: ``"triton"`` runs the kernel in Triton's interpreter too, ``"reference"`` never.

    Returns:
        A tensor like ``sparse``; ``sparse`` itself where there is no order to undo.
    """
    fused = _fused(sparse, impl)
    if fused is not None:
        place = None if order is None else order.perm
        return fused.add(sparse, values, scale, factor, weight, place)
    work = torch.promote_types(sparse.dtype, torch.float32)
    one = torch.ones((), dtype=work, device=sparse.device)
    for part in _token_chunks(sparse):
        kept = values[:, part]
        if scale is not None:
            kept = kept.to(work) * scale[:, part]
        if weight is not None:
            kept = kept * _rows(weight, part).to(work)
        by = one if factor is None else _rows(factor, part).to(work)
        out = sparse[:, part]
        torch.addcmul(kept, by, out, out=out)
    return sparse if order is None else order.undo(sparse)


def replace_residual(
    values: Tensor,
    scale: Tensor | None,
    index: Index,
    dense: Tensor,
    sparse: Tensor,
    *,
    factor: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Writes ``dense - factor * sparse`` of some tokens and heads into ``values`` (and ``scale``).

    float8 rounds an element x by at most ``max(|x| / 16, amax / 448 / 1024)`` where amax is the
    largest absolute value of its token and head.

    Args:
        values: ``[batch, tokens, heads, dim]``, contiguous.
        scale: Of float8 values, ``[batch, tokens, heads, 1]`` fp32.
        index: Of batch (all of it), tokens and heads; slices and at most one tensor of positions.
        dense: Attention over all keys, there alone.
        sparse: Attention over the kept keys, of all tokens and heads.
        factor: ``[batch | 1, tokens | 1, heads | 1, 1]`` there alone; None is 1.
        impl: See :func:`add_residual`.
    """
    fused = _fused(sparse, impl)
    if fused is not None and isinstance(index[2], slice):
        fused.replace(values, scale, index, dense, sparse, factor)
        return
    whole = all(isinstance(x, slice) and x == slice(None) for x in index)
    there = sparse if whole else sparse[index]
    fresh = values if whole else torch.empty(dense.shape, dtype=values.dtype, device=values.device)
    rows = scale
    if scale is not None and not whole:
        rows = torch.empty(*dense.shape[:-1], 1, dtype=scale.dtype, device=scale.device)
    work = torch.promote_types(dense.dtype, torch.float32)
    one = torch.ones((), dtype=work, device=dense.device)
    for part in _token_chunks(dense):
        by = one if factor is None else _rows(factor, part)
        missed = torch.addcmul(dense[:, part].to(work), by, there[:, part], value=-1)
        if rows is not None:
            largest = missed.abs().amax(-1, keepdim=True).float()
            # A row of zeros needs a scale too.
            row = (largest / _FLOAT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            rows[:, part] = row
            missed = (missed / row).clamp(-_FLOAT8_MAX, _FLOAT8_MAX)
        fresh[:, part] = missed.to(fresh.dtype)
    if not whole:
        # Indexed writes know no float8.
        eight = values.dtype == torch.float8_e4m3fn
        target, source = (x.view(torch.uint8) if eight else x for x in (values, fresh))
        target[index] = source
        if scale is not None and rows is not None:
            scale[index] = rows


def _rows(x: Tensor, part: slice) -> Tensor:
    """Some tokens of what may be the same for all."""
    return x if x.shape[1] == 1 else x[:, part]


def _token_chunks(x: Tensor) -> list[slice]:
    tokens = x.shape[1]
    size = max(1, _CHUNK_ELEMENTS // max(1, x[:, :1].numel()))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _fused(x: Tensor, impl: str) -> ModuleType | None:
    """The Triton kernels, if they are to compute this."""
    if impl == "reference" or not (x.is_cuda or impl == "triton"):
        return None
    kernels = _load()
    return None if kernels is None or kernels.refusals(x, None) else kernels


@lru_cache(maxsize=1)
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("dit_sparse.kernels.triton_residual")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return None
