"""The specification: loops over batch, heads and query blocks, in fp64 for fp64 input else fp32.

Slow on purpose. Every other implementation is tested against this one in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.ops import (
    Attended,
    AttentionCall,
    BlockMassCall,
    Impl,
    NeighborhoodCall,
    ReorderCall,
    SummarizeCall,
    TopBlocks,
    TopBlocksCall,
    merge,
    work_dtype,
)
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import PackedMask, block_count


def _seen_keys(call: AttentionCall, batch: int, head: int, row: int) -> Tensor:
    """Positions of the keys that query block ``row`` may see, ascending."""
    positions = torch.arange(call.k.shape[1], device=call.k.device)
    seen = torch.ones_like(positions, dtype=torch.bool)
    if call.mask is not None:
        mask = call.mask.lists()
        b = batch if mask.shape[0] > 1 else 0
        h = head if mask.shape[1] > 1 else 0
        count = int(mask.kv_num_blocks[b, h, row])
        seen = torch.isin(positions // mask.block[1], mask.kv_indices[b, h, row, :count].long())
    if call.key_valid is not None:
        seen = seen & call.key_valid[batch]
    return positions[seen]


def _skipped_blocks(call: AttentionCall, batch: int, head: int, row: int) -> list[int]:
    """Key blocks that query block ``row`` skips and that a summary stands for."""
    if call.mask is None or call.summary is None:
        return []
    keep = call.mask.dense()
    b, h = batch if keep.shape[0] > 1 else 0, head if keep.shape[1] > 1 else 0
    return [
        column
        for column in range(call.mask.shape[3])
        if not keep[b, h, row, column] and call.summary.count[batch, column] > 0
    ]


def _attend(call: AttentionCall) -> Attended:
    work = work_dtype(call.q.dtype)
    batch, q_len, heads, _ = call.q.shape
    out = torch.zeros(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    lse = torch.full((batch, heads, q_len), float("-inf"), dtype=work, device=call.q.device)
    kept_lse = lse.clone()
    size = call.mask.block[0] if call.mask is not None else q_len
    for b in range(batch):
        for h in range(heads):
            for row in range(block_count(q_len, size)):
                rows = slice(row * size, min((row + 1) * size, q_len))
                keys = _seen_keys(call, b, h, row)
                query = call.q[b, rows, h].to(work)
                scores = call.scale * (query @ call.k[b, keys, h].to(work).T)
                kept_lse[b, h, rows] = scores.logsumexp(-1)
                skipped = _skipped_blocks(call, b, h, row)
                if call.summary is not None:
                    means = call.summary.key_mean[b, skipped, h].to(work)
                    log_count = call.summary.count[b, skipped].to(work).log()
                    scores = torch.cat([scores, call.scale * (query @ means.T) + log_count], 1)
                lse[b, h, rows] = scores.logsumexp(-1)
                if call.v is None or scores.shape[1] == 0:
                    continue
                weights, values = scores.softmax(-1), call.v[b, keys, h].to(work)
                if call.summary is not None:
                    values = torch.cat([values, call.summary.value_mean[b, skipped, h].to(work)])
                result = weights @ values
                if call.summary is not None and call.summary.slope is not None:
                    share = weights[:, len(keys) :].sum(-1, keepdim=True)
                    result += share * call.scale * (query @ call.summary.slope[b, h].to(work))
                out[b, rows, h] = result.to(out.dtype)
    return Attended(out, lse, None if call.summary is None else kept_lse)


class ReferenceAttention(Impl):
    op, name, rank = "attention", "reference", 0
    summaries = True

    def reasons(self, call: AttentionCall) -> list[str]:
        return []

    def __call__(self, call: AttentionCall) -> Attended:
        return _attend(call)


class ReferenceRowLse(Impl):
    op, name, rank = "row_lse", "reference", 0

    def reasons(self, call: AttentionCall) -> list[str]:
        return []

    def __call__(self, call: AttentionCall) -> Tensor:
        return _attend(call).lse


class ReferenceNeighborhood(Impl):
    op, name, rank = "neighborhood", "reference", 0

    def reasons(self, call: NeighborhoodCall) -> list[str]:
        return []

    def __call__(self, call: NeighborhoodCall) -> Attended:
        work = work_dtype(call.q.dtype)
        batch, tokens, heads, _ = call.q.shape
        size, width = call.partial.block
        out = torch.zeros(call.q.shape, dtype=work, device=call.q.device)
        lse = torch.full((batch, heads, tokens), float("-inf"), dtype=work, device=call.q.device)
        positions = torch.arange(tokens, device=call.q.device)
        listed = call.partial.dense()[0, 0]
        for row in range(block_count(tokens, size)):
            rows = positions[row * size : (row + 1) * size]
            keys = positions[listed[row, positions // width]]
            for b in range(batch):
                real = keys if call.key_valid is None else keys[call.key_valid[b, keys]]
                hidden = ~call.mask.visible(rows, real)
                for h in range(heads):
                    query, key = call.q[b, rows, h].to(work), call.k[b, real, h].to(work)
                    scores = (call.scale * (query @ key.T)).masked_fill(hidden, float("-inf"))
                    lse[b, h, rows] = scores.logsumexp(-1)
                    weights = scores.softmax(-1).masked_fill(hidden, 0.0)
                    out[b, rows, h] = weights @ call.v[b, real, h].to(work)
        found = Attended(out, lse)
        whole = found if call.seen is None else merge(found, call.seen)
        return Attended(whole.out.to(call.q.dtype), whole.lse)


class ReferenceBlockMass(Impl):
    op, name, rank = "block_mass", "reference", 0

    def reasons(self, call: BlockMassCall) -> list[str]:
        return []

    def __call__(self, call: BlockMassCall) -> Tensor:
        work = work_dtype(call.q.dtype)
        batch, q_len, heads, _ = call.q.shape
        kv_len = call.k.shape[1]
        rows, columns = block_count(q_len, call.block[0]), block_count(kv_len, call.block[1])
        mass = torch.zeros(batch, heads, rows, columns, dtype=work, device=call.q.device)
        for b in range(batch):
            for h in range(heads):
                for p in range(rows):
                    i = slice(p * call.block[0], min((p + 1) * call.block[0], q_len))
                    lse = call.lse[b, h, i, None].to(work)
                    scores = call.scale * (call.q[b, i, h].to(work) @ call.k[b, :, h].to(work).T)
                    weight = (scores - lse).exp().where(lse > float("-inf"), 0.0)
                    if call.key_valid is not None:
                        weight = weight.where(call.key_valid[b], 0.0)
                    for c in range(columns):
                        j = slice(c * call.block[1], min((c + 1) * call.block[1], kv_len))
                        mass[b, h, p, c] = weight[:, j].sum()
        return mass


class ReferenceSummarize(Impl):
    op, name, rank = "summarize", "reference", 0

    def reasons(self, call: SummarizeCall) -> list[str]:
        return []

    def __call__(self, call: SummarizeCall) -> BlockSummary:
        work = work_dtype(call.k.dtype)
        batch, kv_len, heads, dim = call.k.shape
        columns = block_count(kv_len, call.block)
        key_mean = torch.zeros(batch, columns, heads, dim, dtype=work, device=call.k.device)
        value_mean = torch.zeros_like(key_mean)
        count = torch.zeros(batch, columns, device=call.k.device)
        slope = torch.zeros(batch, heads, dim, dim, dtype=work, device=call.k.device)
        for b in range(batch):
            for c in range(call.blocks):
                keys = torch.arange(c * call.block, min((c + 1) * call.block, kv_len))
                if call.key_valid is not None:
                    keys = keys[call.key_valid[b, keys].cpu()]
                count[b, c] = len(keys)
                for h in range(heads if len(keys) else 0):
                    key, value = call.k[b, keys, h].to(work), call.v[b, keys, h].to(work)
                    key_mean[b, c, h], value_mean[b, c, h] = key.mean(0), value.mean(0)
                    slope[b, h] += (key - key_mean[b, c, h]).T @ value
        slope /= count.to(work).sum(-1).clamp(min=1)[:, None, None, None]
        return BlockSummary(
            key_mean.to(call.k.dtype),
            value_mean.to(call.v.dtype),
            count,
            slope if call.first_order else None,
        )


class ReferenceTopBlocks(Impl):
    op, name, rank = "top_blocks", "reference", 0

    def reasons(self, call: TopBlocksCall) -> list[str]:
        return []

    def __call__(self, call: TopBlocksCall) -> TopBlocks:
        batch, heads, rows, columns = call.mass.shape
        keep = torch.ones(call.mass.shape, dtype=torch.bool, device=call.mass.device)
        kept_mass = call.mass.new_zeros(batch, heads, rows)
        for b in range(batch):
            for h in range(heads):
                count = int(call.count.expand(batch, heads)[b, h])
                for row in range(min(rows, call.free[0])):
                    mass = call.mass[b, h, row].tolist()
                    competing = range(min(columns, call.free[1]))
                    order = sorted(competing, key=lambda c: (-mass[c], c))
                    for column in order[count:]:
                        keep[b, h, row, column] = False
                    kept_mass[b, h, row] = sum(mass[c] for c in order[:count])
        return TopBlocks(PackedMask.from_dense(keep, call.block, call.seq, call.longest), kept_mass)


class ReferenceReorder(Impl):
    op, name, rank = "reorder", "reference", 0

    def reasons(self, call: ReorderCall) -> list[str]:
        return []

    def __call__(self, call: ReorderCall) -> tuple[Tensor, ...]:
        return tuple(x.index_select(1, call.index) for x in call.tensors)
