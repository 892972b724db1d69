"""Residuals of sparse attention in Triton: added, and replaced, in one pass over memory each.

float8 (e4m3) is packed and unpacked by integer arithmetic, since the conversion instructions need
compute capability 8.9; the bits are those of PyTorch's conversion.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.triton_common import ceil_div, last_contiguous, padded_dim, refusals
from dit_sparse.kernels.triton_launch import Launch, launch_kernel

__all__ = ["add", "refusals", "replace"]

# Elements that a program holds.
_TILE = 4096


@triton.jit
def _unpack(code):
    """e4m3 bits as fp32."""
    code = code.to(tl.int32)
    # The exponent bias is 7 here and 127 there; below 2^-6 steps are 2^-9.
    normal = (((code & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = (code & 7).to(tl.float32) * 0.001953125
    value = tl.where((code & 0x78) == 0, small, normal)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def _pack(value):
    """fp32 within [-448, 448] as e4m3 bits, rounded to nearest, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    normal = rounded - (120 << 3)
    # Adding 2^23 rounds a multiple of 2^-9 to an integer in the last bits.
    small = (tl.abs(value) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(tl.abs(value) < 0.015625, small, normal)
    return (sign | code).to(tl.uint8)


@triton.jit
def _add_kernel(
    out,  # [batch, tokens, heads, dim], any token order
    sparse,  # same
    values,  # same, contiguous; uint8 with EIGHT
    scale,  # [batch, tokens, heads] fp32, contiguous, or None
    factor,  # [batch, tokens, heads], any strides, or None
    weight,  # same
    place,  # [tokens] int64: where each token goes, or None
    tokens,
    heads,
    o_batch,
    o_token,
    o_head,
    s_batch,
    s_token,
    s_head,
    f_batch,
    f_token,
    f_head,
    w_batch,
    w_token,
    w_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    EIGHT: tl.constexpr,
):
    """``ROWS`` pairs of token and head of one batch element."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    live = row < tokens * heads
    token = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)[None, :]
    inside = live[:, None] & (dims < DIM)
    line = batch * tokens * heads + row
    kept = tl.load(values + line[:, None] * DIM + dims, mask=inside, other=0)
    kept = _unpack(kept) if EIGHT else kept.to(tl.float32)
    if scale is not None:
        kept *= tl.load(scale + line, mask=live, other=0.0)[:, None]
    if weight is not None:
        at = batch * w_batch + token * w_token + head * w_head
        kept *= tl.load(weight + at, mask=live, other=0.0).to(tl.float32)[:, None]
    at = batch * s_batch + token * s_token + head * s_head
    value = tl.load(sparse + at[:, None] + dims, mask=inside, other=0.0).to(tl.float32)
    if factor is not None:
        at = batch * f_batch + token * f_token + head * f_head
        value *= tl.load(factor + at, mask=live, other=0.0).to(tl.float32)[:, None]
    if place is not None:
        token = tl.load(place + token, mask=live, other=0)
    at = batch * o_batch + token * o_token + head * o_head
    tl.store(out + at[:, None] + dims, (value + kept).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _replace_kernel(
    values,  # [batch, tokens, heads, dim], contiguous; uint8 with EIGHT
    scale,  # [batch, tokens, heads] fp32, contiguous, or None
    dense,  # [batch, part_tokens, part_heads, dim]
    sparse,  # [batch, tokens, heads, dim]
    factor,  # [batch, part_tokens, part_heads], any strides, or None
    rows,  # [part_tokens] int64: which tokens, or None for all
    tokens,
    heads,
    part_tokens,
    part_heads,
    first_head,
    head_step,
    d_batch,
    d_token,
    d_head,
    s_batch,
    s_token,
    s_head,
    f_batch,
    f_token,
    f_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    EIGHT: tl.constexpr,
):
    """``ROWS`` pairs of token and head of the part, of one batch element."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    live = row < part_tokens * part_heads
    token = (row // part_heads).to(tl.int64)
    head = (row % part_heads).to(tl.int64)
    dims = tl.arange(0, DIM_PAD)[None, :]
    inside = live[:, None] & (dims < DIM)
    at = batch * d_batch + token * d_token + head * d_head
    missed = tl.load(dense + at[:, None] + dims, mask=inside, other=0.0).to(tl.float32)
    by = 1.0
    if factor is not None:
        at = batch * f_batch + token * f_token + head * f_head
        by = tl.load(factor + at, mask=live, other=0.0).to(tl.float32)[:, None]
    if rows is not None:
        token = tl.load(rows + token, mask=live, other=0)
    head = first_head + head * head_step
    at = batch * s_batch + token * s_token + head * s_head
    missed -= by * tl.load(sparse + at[:, None] + dims, mask=inside, other=0.0).to(tl.float32)
    line = (batch * tokens + token) * heads + head
    if EIGHT:
        # A row of zeros needs a scale too.
        size = tl.maximum(tl.max(tl.abs(missed), 1) / 448.0, 1.1754943508222875e-38)
        tl.store(scale + line, size, mask=live)
        missed = tl.minimum(tl.maximum(missed / size[:, None], -448.0), 448.0)
        tl.store(values + line[:, None] * DIM + dims, _pack(missed), mask=inside)
    else:
        kept = missed.to(values.dtype.element_ty)
        tl.store(values + line[:, None] * DIM + dims, kept, mask=inside)


def add(
    sparse: Tensor,
    values: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    weight: Tensor | None,
    place: Tensor | None,
) -> Tensor:
    """See :func:`dit_sparse.kernels.residual.add_residual`; ``place`` is the order's ``perm``."""
    given, sparse = sparse, last_contiguous(sparse)
    batch, tokens, heads, dim = sparse.shape
    out = sparse if place is None else sparse.new_empty(sparse.shape)
    if sparse.numel():
        steps = (*out.stride()[:3], *sparse.stride()[:3],
                 *_strides(factor, sparse), *_strides(weight, sparse))  # fmt: skip
        launch, rows = _add_plan(tokens, heads, dim, steps, scale is not None)
        tensors = (out, sparse, _bits(values), scale, factor, weight, place)
        launch((ceil_div(tokens * heads, rows), batch), tensors)
    if place is None and out is not given:
        given.copy_(out)
        return given
    return out


@lru_cache(maxsize=1024)
def _add_plan(
    tokens: int, heads: int, dim: int, steps: tuple[int, ...], eight: bool
) -> tuple[Launch, int]:
    """The launch, and the pairs of token and head of a program."""
    pad = padded_dim(dim)
    rows = max(1, _TILE // pad)
    launch = Launch(
        _add_kernel, (tokens, heads, *steps),
        DIM=dim, DIM_PAD=pad, ROWS=rows, EIGHT=eight, num_warps=4,
    )  # fmt: skip
    return launch, rows


def replace(
    values: Tensor,
    scale: Tensor | None,
    index: tuple[slice | Tensor, ...],
    dense: Tensor,
    sparse: Tensor,
    factor: Tensor | None,
) -> None:
    """See :func:`dit_sparse.kernels.residual.replace_residual`; heads are a slice."""
    dense, sparse = last_contiguous(dense), last_contiguous(sparse)
    batch, part_tokens, part_heads, dim = dense.shape
    _, tokens, heads, _ = sparse.shape
    rows: slice | Tensor | None
    _, rows, which = index
    if isinstance(rows, slice):
        rows = None if rows == slice(None) else torch.arange(tokens, device=dense.device)[rows]
    assert isinstance(which, slice)
    first_head, _, head_step = which.indices(heads)
    if dense.numel():
        pad = padded_dim(dim)
        size = max(1, _TILE // pad)
        launch_kernel(
            _replace_kernel, (ceil_div(part_tokens * part_heads, size), batch),
            (_bits(values), scale, dense, sparse, factor, rows),
            (tokens, heads, part_tokens, part_heads, first_head, head_step,
             *dense.stride()[:3], *sparse.stride()[:3], *_strides(factor, dense)),
            DIM=dim, DIM_PAD=pad, ROWS=size, EIGHT=scale is not None, num_warps=4,
        )  # fmt: skip


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _strides(x: Tensor | None, like: Tensor) -> tuple[int, ...]:
    """Strides of ``x`` broadcast to the rows of ``like``."""
    return (0, 0, 0) if x is None else x.expand(*like.shape[:-1], 1).stride()[:3]
