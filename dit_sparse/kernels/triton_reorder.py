"""Tokens of several tensors in another order, in one launch.

Sparse attention in tile order moves queries, keys, values and its output at every layer. This is
bound by memory alone: every element is read once and written once, 16 bytes at a time whatever the
order of heads and tokens in memory.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.ops import Impl, ReorderCall
from dit_sparse.kernels.triton_common import INTERPRETED, RANK, ceil_div, power_of_two
from dit_sparse.kernels.triton_launch import Launch

_MOST = 3


@triton.jit
def _move(
    x,  # [batch, tokens, heads, dim]
    out,  # the same, contiguous
    source,  # [TOKENS] int64: where the tokens come from
    rows,  # [TOKENS]: where they go
    live,
    column,  # [COLUMNS]: place in heads * dim
    batch,
    x_batch,
    x_token,
    x_head,
    tokens,
    width,
    DIM: tl.constexpr,
):
    inside = live[:, None] & (column < width)[None, :]
    head, dim = column // DIM, column % DIM
    at = source[:, None] * x_token + (head.to(tl.int64) * x_head + dim)[None, :]
    value = tl.load(x + batch * x_batch + at, mask=inside, other=0.0)
    tl.store(out + (batch * tokens + rows)[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def _reorder_kernel(
    x0,
    x1,
    x2,
    out0,
    out1,
    out2,
    index,  # [tokens] int64
    batch0,
    token0,
    head0,
    batch1,
    token1,
    head1,
    batch2,
    token2,
    head2,
    tokens,
    width,  # heads * dim
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    live = rows < tokens
    source = tl.load(index + rows, mask=live, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(2) % COUNT
    batch = (tl.program_id(2) // COUNT).to(tl.int64)
    if which == 0:
        _move(
            x0, out0, source, rows, live, column, batch, batch0, token0, head0, tokens, width, DIM
        )
    if COUNT > 1 and which == 1:
        _move(
            x1, out1, source, rows, live, column, batch, batch1, token1, head1, tokens, width, DIM
        )
    if COUNT > 2 and which == 2:
        _move(
            x2, out2, source, rows, live, column, batch, batch2, token2, head2, tokens, width, DIM
        )


class TritonReorder(Impl):
    op, name, rank = "reorder", "triton", RANK

    def reasons(self, call: ReorderCall) -> list[str]:
        reasons = []
        first = call.tensors[0]
        if not (first.is_cuda or INTERPRETED):
            reasons.append(f"needs a CUDA device (or TRITON_INTERPRET=1), got {first.device}")
        if any(
            x.ndim != 4 or x.shape != first.shape or x.dtype != first.dtype for x in call.tensors
        ):
            reasons.append("takes tensors [batch, tokens, heads, dim] of one shape and dtype")
        elif any(x.stride(-1) != 1 for x in call.tensors):
            reasons.append("the last dimension must be contiguous")
        if len(call.tensors) > _MOST:
            reasons.append(f"takes at most {_MOST} tensors, got {len(call.tensors)}")
        return reasons

    def __call__(self, call: ReorderCall) -> tuple[Tensor, ...]:
        batch, _, heads, dim = call.tensors[0].shape
        tokens = len(call.index)
        outs = tuple([x.new_empty((batch, tokens, heads, dim)) for x in call.tensors])
        if not outs[0].numel():
            return outs
        missing = _MOST - len(outs)
        inputs = (*call.tensors, *(call.tensors[0],) * missing)
        targets = (*outs, *(outs[0],) * missing)
        strides = tuple([x.stride() for x in inputs])
        launch, grid = _plan(strides, tokens, heads, dim, batch, len(outs))
        launch(grid, (*inputs, *targets, call.index.contiguous()))
        return outs


@lru_cache(maxsize=1024)
def _plan(
    strides: tuple[tuple[int, ...], ...],
    tokens: int,
    heads: int,
    dim: int,
    batch: int,
    count: int,
) -> tuple[Launch, tuple[int, int, int]]:
    """The launch for ``count`` tensors with these ``strides``, and its programs."""
    width = heads * dim
    columns = min(2048, power_of_two(width))
    rows = max(1, 8192 // columns)
    launch = Launch(
        _reorder_kernel,
        (*(step for steps in strides for step in steps[:3]), tokens, width),
        COUNT=count, DIM=dim, TOKENS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return launch, (ceil_div(tokens, rows), ceil_div(width, columns), batch * count)
