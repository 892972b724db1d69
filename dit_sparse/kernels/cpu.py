"""Block-sparse attention on the CPU: gather the kept key blocks, then one dense kernel.

The work items are the rows (query blocks) of all batch elements and heads. Rows that keep about
equally many blocks are taken together: their keys and values are gathered into
``[rows, blocks * block, dim]`` and handed to PyTorch's flash kernel, which also returns the LSE.
Rows that keep everything skip the gather and share one call per head. Blocks that a mask skips
are never multiplied.

Memory beside the result: one head-major copy of q, k and v, one of the result, all in the
working precision (fp64 for fp64 input, else fp32), and ``_SCRATCH`` bytes or what one row
needs, whichever is more: at most the keys and values of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.ops import (
    Attended,
    AttentionCall,
    BlockMassCall,
    Impl,
    SummarizeCall,
    TopBlocks,
    TopBlocksCall,
    work_dtype,
)
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import BlockMask, PackedMask, block_count

# Measured on two cores with 64-token blocks of 64 channels: 6 and 12 MiB take the same time, 3 MiB
# loses up to half to the cost of a call, 24 MiB a sixth to cache misses.
_SCRATCH = 8 << 20

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _reasons(*operands: Tensor | None) -> list[str]:
    tensors = [t for t in operands if t is not None]
    reasons = []
    if tensors[0].device.type != "cpu":
        reasons.append(f"needs CPU tensors, got {tensors[0].device}")
    if tensors[0].dtype not in _DTYPES:
        reasons.append(f"needs fp32, fp64, bf16 or fp16, got {tensors[0].dtype}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("is forward only: an operand requires a gradient; use torch.no_grad()")
    return reasons


def _head_major(x: Tensor, block: int, keep: Tensor | None = None) -> Tensor:
    """Copy of ``x`` in working precision, zero past its end and where ``keep`` is False.

    Args:
        x: ``[batch, tokens, heads, dim]``.
        block: The tokens are padded to a multiple of it.
        keep: ``[batch, tokens]`` bool.

    Returns:
        ``[batch, heads, blocks * block, dim]``, contiguous.
    """
    batch, tokens, heads, dim = x.shape
    padded = block_count(tokens, block) * block
    copy = torch.empty(batch, heads, padded, dim, dtype=work_dtype(x.dtype))
    copy[:, :, tokens:] = 0
    copy[:, :, :tokens] = x.transpose(1, 2)
    if keep is not None:
        copy[:, :, :tokens].masked_fill_(~keep[:, None, :, None], 0)
    return copy


def _key_bias(k: Tensor, key_valid: Tensor | None, block: int) -> Tensor | None:
    """0 for keys that exist and ``-inf`` for others, ``[batch, kv_blocks, block]``.

    None where all keys exist and fill their blocks.
    """
    batch, tokens = k.shape[:2]
    blocks = block_count(tokens, block)
    if key_valid is None and blocks * block == tokens:
        return None
    bias = torch.full((batch, blocks * block), float("-inf"), dtype=work_dtype(k.dtype))
    if key_valid is None:
        bias[:, :tokens] = 0
    else:
        bias[:, :tokens].masked_fill_(key_valid, 0)
    return bias.view(batch, blocks, block)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """``scale * q k^T + bias``, ``[items, q_len, kv_len]``; ``bias`` is ``[items, 1, kv_len]``."""
    if bias is None:
        return torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=scale)
    return torch.baddbmm(bias, q, k.mT, alpha=scale)


def _dense(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Any, Tensor]:
    """Attention of independent items.

    Args:
        q: ``[items, heads, q_len, dim]`` in working precision.
        k: ``[items, heads, kv_len, dim]``.
        v: As ``k``; None computes the LSE alone.
        bias: ``[items, 1, 1, kv_len]``, 0 or ``-inf``.
        scale: Factor on the scores.

    Returns:
        ``out [items, heads, q_len, dim]`` (None without ``v``) and ``lse [items, heads, q_len]``.
    """
    if v is not None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=scale
        )
        if bias is not None:
            # The kernel gives out 0 but LSE 0 to a row without keys.
            lse = lse.masked_fill((bias == float("-inf")).all(-1), float("-inf"))
        return out, lse
    items, heads, q_len, _ = q.shape
    lse = q.new_empty(items, heads, q_len)
    for item in range(items if heads > 1 else 1):
        # One head per item: all items at once. Many heads: they are the batch of one product.
        part = slice(item, item + 1) if heads > 1 else slice(None)
        keys, group = k[part].flatten(0, 1), None if bias is None else bias[part].flatten(0, 1)
        if group is not None and heads > 1:
            group = group.expand(heads, -1, -1)
        # Scores and the exponentials that logsumexp allocates.
        step = max(1, _SCRATCH // (2 * keys.shape[0] * keys.shape[1] * keys.element_size()))
        for start in range(0, q_len, step):
            rows = slice(start, start + step)
            scores = _scores(q[part, :, rows].flatten(0, 1), keys, group, scale)
            lse[part, :, rows] = scores.logsumexp(-1).view_as(lse[part, :, rows])
    return None, lse


def _chunks(counts: list[int], block_bytes: int) -> Iterator[tuple[slice, int]]:
    """Cuts rows, sorted by falling count, into runs to compute together.

    A run fits ``_SCRATCH`` and its shortest row has at least 7/8 of the blocks of its longest, so
    that padding costs at most that much.

    Args:
        counts: Blocks kept by each row.
        block_bytes: Scratch needed for one block of one row.

    Yields:
        The run, and the blocks of its longest row.
    """
    start = 0
    while start < len(counts):
        longest = counts[start]
        stop = min(len(counts), start + max(1, _SCRATCH // (longest * block_bytes)))
        while counts[stop - 1] < longest - longest // 8:
            stop -= 1
        yield slice(start, stop), longest
        start = stop


def _sparse(call: AttentionCall, mask: BlockMask | PackedMask) -> tuple[Tensor | None, Tensor]:
    """Attention over the blocks of ``mask``; shapes as in :func:`_dense`, rows padded to blocks."""
    batch, _, heads, dim = call.q.shape
    (size, width), (rows, columns) = mask.block, mask.shape[2:]
    items = batch * heads
    q = _head_major(call.q, size).view(items, rows, size, dim)
    k = _head_major(call.k, width, call.key_valid).view(items, columns, width * dim)
    v: Any = None
    if call.v is not None:
        v = _head_major(call.v, width, call.key_valid).view(items, columns, width * dim)
    bias = _key_bias(call.k, call.key_valid, width)  # [batch, columns, width]
    out: Any = None if v is None else torch.zeros_like(q)
    lse = q.new_full((items, rows, size), float("-inf"))

    lists = mask.lists()
    counts = lists.kv_num_blocks.expand(batch, heads, rows).reshape(items, rows)
    indices = lists.kv_indices.expand(batch, heads, rows, -1)

    full = counts == columns
    for item in full.any(-1).nonzero()[:, 0].tolist():
        row = full[item].nonzero()[:, 0]
        attended, lse_rows = _dense(
            q[item, row].view(1, 1, -1, dim),
            k[item].view(1, 1, -1, dim),
            None if v is None else v[item].view(1, 1, -1, dim),
            None if bias is None else bias[item // heads].view(1, 1, 1, -1),
            call.scale,
        )
        lse[item, row] = lse_rows.view(-1, size)
        if out is not None:
            out[item, row] = attended.view(-1, size, dim)

    item, row = ((counts > 0) & ~full).nonzero(as_tuple=True)
    kept, order = counts[item, row].sort(descending=True, stable=True)
    item, row = item[order], row[order]
    block_bytes = width * q.element_size() * (dim + (2 * size if v is None else dim))
    runs = list(_chunks(kept.tolist(), block_bytes))
    # Written anew by every run: fresh memory would cost as much in page faults as the copy does.
    most = max((longest * (run.stop - run.start) for run, longest in runs), default=0)
    scratch: list[Any] = [None if x is None else x.new_empty(most, width * dim) for x in (k, v)]
    for run, longest in runs:
        i, r = item[run], row[run]
        listed = indices[..., :longest][i // heads, i % heads, r].long()  # [run, longest]
        live = torch.arange(longest) < kept[run, None]
        # Undefined entries repeat the row's first block and are then masked.
        listed = torch.where(live, listed, listed[:, :1])
        flat = (i[:, None] * columns + listed).flatten()
        shape = (len(i), 1, longest * width, dim)
        shift = None
        if bias is not None:
            shift = bias[(i // heads)[:, None], listed]
        elif kept[run][-1] < longest:
            shift = q.new_zeros(len(i), longest, width)
        if shift is not None:
            shift.masked_fill_(~live.unsqueeze(-1), float("-inf"))
            shift = shift.view(len(i), 1, 1, -1)
        keys: Any
        values: Any
        keys, values = (
            None
            if x is None
            else torch.index_select(x.view(items * columns, -1), 0, flat, out=to[: len(flat)])
            for x, to in zip((k, v), scratch, strict=True)
        )
        attended, lse_rows = _dense(
            q[i, r].unsqueeze(1),
            keys.view(shape),
            None if values is None else values.view(shape),
            shift,
            call.scale,
        )
        lse[i, r] = lse_rows[:, 0]
        if out is not None:
            out[i, r] = attended[:, 0]
    out = None if out is None else out.view(batch, heads, rows * size, dim)
    return out, lse.view(batch, heads, rows * size)


def _attend(call: AttentionCall) -> tuple[Any, Tensor]:
    """Output ``[batch, q_len, heads, dim]`` (None without ``v``), LSE ``[batch, heads, q_len]``."""
    batch, q_len, heads, _ = call.q.shape
    if call.q.numel() == 0 or call.k.numel() == 0:
        lse = torch.full((batch, heads, q_len), float("-inf"), dtype=work_dtype(call.q.dtype))
        return torch.zeros(call.q.shape, dtype=call.q.dtype), lse
    if call.mask is not None:
        out, lse = _sparse(call, call.mask)
    elif call.key_valid is not None:
        bias = _key_bias(call.k, call.key_valid, 1)
        out, lse = _dense(
            _head_major(call.q, 1),
            _head_major(call.k, 1, call.key_valid),
            None if call.v is None else _head_major(call.v, 1, call.key_valid),
            None if bias is None else bias.view(batch, 1, 1, -1),
            call.scale,
        )
    else:
        q: Any
        k: Any
        v: Any  # None where only the LSE is asked for.
        q, k, v = (
            None if x is None else _unit_stride(x.to(work_dtype(x.dtype))).transpose(1, 2)
            for x in (call.q, call.k, call.v)
        )
        out, lse = _dense(q, k, v, None, call.scale)
    if out is not None:
        out = out[:, :, :q_len].transpose(1, 2).to(call.q.dtype).contiguous()
    return out, lse[:, :, :q_len].contiguous()


def _row_ranges(rows: int, size: int, limit: int) -> Iterator[slice]:
    """Cuts ``rows`` blocks of ``size`` into runs of whole blocks or, by ``limit``, into parts."""
    if limit >= size:
        step = limit // size * size
        for start in range(0, rows * size, step):
            yield slice(start, min(start + step, rows * size))
        return
    for first in range(0, rows * size, size):
        for start in range(first, first + size, limit):
            yield slice(start, min(start + limit, first + size))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class CpuAttention(Impl):
    op, name, rank = "attention", "cpu", 50

    def reasons(self, call: AttentionCall) -> list[str]:
        return _reasons(call.q, call.k, call.v)

    def __call__(self, call: AttentionCall) -> Attended:
        return Attended(*_attend(call))


class CpuRowLse(Impl):
    op, name, rank = "row_lse", "cpu", 50

    def reasons(self, call: AttentionCall) -> list[str]:
        return _reasons(call.q, call.k)

    def __call__(self, call: AttentionCall) -> Tensor:
        return _attend(call)[1]


class CpuBlockMass(Impl):
    """Scratch: ``_SCRATCH`` bytes of scores (at least one query row), one copy of q and k."""

    op, name, rank = "block_mass", "cpu", 50

    def reasons(self, call: BlockMassCall) -> list[str]:
        return _reasons(call.q, call.k, call.lse)

    def __call__(self, call: BlockMassCall) -> Tensor:
        size, width = call.block
        batch, q_len, heads, dim = call.q.shape
        rows, columns = block_count(q_len, size), block_count(call.k.shape[1], width)
        work = work_dtype(call.q.dtype)
        mass = torch.zeros(batch * heads, rows, columns, dtype=work)
        if mass.numel() == 0 or dim == 0:
            return mass.view(batch, heads, rows, columns)
        q = _head_major(call.q, size).flatten(0, 1)
        k = _head_major(call.k, width, call.key_valid).flatten(0, 1)
        bias = _key_bias(call.k, call.key_valid, width)
        # exp(s - inf) = 0: rows of padding and rows without keys contribute nothing.
        lse = torch.full((batch, heads, rows * size), float("inf"), dtype=work)
        lse[:, :, :q_len] = call.lse.masked_fill(call.lse == float("-inf"), float("inf"))
        lse = lse.view(batch * heads, rows * size, 1)

        limit = max(1, _SCRATCH // (columns * width * q.element_size()))
        for item in range(batch * heads):
            one = slice(item, item + 1)
            shift = None if bias is None else bias[item // heads].view(1, 1, -1)
            for part in _row_ranges(rows, size, limit):
                scores = _scores(q[one, part], k[one], shift, call.scale)[0]
                weight = scores.sub_(lse[item, part]).exp_()
                blocks = slice(part.start // size, -(-part.stop // size))
                sums = weight.view(blocks.stop - blocks.start, -1, columns * width).sum(1)
                mass[item, blocks] += sums.view(-1, columns, width).sum(-1)
        return mass.view(batch, heads, rows, columns)


class CpuSummarize(Impl):
    """One copy of k and v, and one of the centred keys for the slope."""

    op, name, rank = "summarize", "cpu", 50

    def reasons(self, call: SummarizeCall) -> list[str]:
        return _reasons(call.k, call.v)

    def __call__(self, call: SummarizeCall) -> BlockSummary:
        batch, tokens = call.k.shape[:2]
        columns = block_count(tokens, call.block)
        work = work_dtype(call.k.dtype)
        live = torch.zeros(batch, columns * call.block, dtype=torch.bool)
        live[:, :tokens] = True if call.key_valid is None else call.key_valid
        live[:, call.blocks * call.block :] = False
        count = live.view(batch, columns, call.block).sum(-1).float()
        # [batch, heads, columns, block, dim], zero where not live.
        keys, values = (
            _head_major(x, call.block, live[:, :tokens]).unflatten(2, (columns, call.block))
            for x in (call.k, call.v)
        )
        per_key = 1 / count.to(work).clamp(min=1)[:, None, :, None]
        key_mean, value_mean = keys.sum(-2) * per_key, values.sum(-2) * per_key
        slope = None
        if call.first_order:
            # Dead keys are centred to minus the mean, but their values are zero.
            centred = (keys - key_mean.unsqueeze(-2)).flatten(2, 3)
            slope = centred.mT @ values.flatten(2, 3)
            slope /= count.to(work).sum(-1).clamp(min=1)[:, None, None, None]
        return BlockSummary(
            key_mean.transpose(1, 2).to(call.k.dtype).contiguous(),
            value_mean.transpose(1, 2).to(call.v.dtype).contiguous(),
            count,
            slope,
        )


class CpuTopBlocks(Impl):
    op, name, rank = "top_blocks", "cpu", 50

    def reasons(self, call: TopBlocksCall) -> list[str]:
        return _reasons(call.mass)

    def __call__(self, call: TopBlocksCall) -> TopBlocks:
        free = call.mass[..., : call.free[0], : call.free[1]]
        order = free.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(free.shape[-1]).expand_as(order)
        )
        chosen = rank < call.count[..., None, None]
        keep = torch.ones(call.mass.shape, dtype=torch.bool)
        keep[..., : call.free[0], : call.free[1]] = chosen
        kept_mass = call.mass.new_zeros(call.mass.shape[:3])
        kept_mass[..., : call.free[0]] = free.where(chosen, 0.0).sum(-1)
        return TopBlocks(PackedMask.from_dense(keep, call.block, call.seq, call.longest), kept_mass)
