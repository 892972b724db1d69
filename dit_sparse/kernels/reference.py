"""The specification: loops over batch, heads and query blocks, in fp64 for fp64 input else fp32.

Slow on purpose. Every other implementation is tested against this one in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.ops import Attended, AttentionCall, BlockMassCall, Impl
from dit_sparse.mask import block_count


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _seen_keys(call: AttentionCall, batch: int, head: int, row: int) -> Tensor:
    """Positions of the keys that query block ``row`` may see, ascending."""
    positions = torch.arange(call.k.shape[1], device=call.k.device)
    seen = torch.ones_like(positions, dtype=torch.bool)
    if call.mask is not None:
        mask = call.mask
        b = batch if mask.shape[0] > 1 else 0
        h = head if mask.shape[1] > 1 else 0
        count = int(mask.kv_num_blocks[b, h, row])
        seen = torch.isin(positions // mask.block[1], mask.kv_indices[b, h, row, :count].long())
    if call.key_valid is not None:
        seen = seen & call.key_valid[batch]
    return positions[seen]


def _attend(call: AttentionCall) -> Attended:
    work = _work_dtype(call.q.dtype)
    batch, q_len, heads, _ = call.q.shape
    out = torch.zeros(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    lse = torch.full((batch, heads, q_len), float("-inf"), dtype=work, device=call.q.device)
    size = call.mask.block[0] if call.mask is not None else q_len
    for b in range(batch):
        for h in range(heads):
            for row in range(block_count(q_len, size)):
                rows = slice(row * size, min((row + 1) * size, q_len))
                keys = _seen_keys(call, b, h, row)
                if len(keys) == 0:
                    continue
                scores = call.scale * (call.q[b, rows, h].to(work) @ call.k[b, keys, h].to(work).T)
                lse[b, h, rows] = scores.logsumexp(-1)
                if call.v is not None:
                    out[b, rows, h] = (scores.softmax(-1) @ call.v[b, keys, h].to(work)).to(
                        out.dtype
                    )
    return Attended(out, lse)


class ReferenceAttention(Impl):
    op, name, rank = "attention", "reference", 0

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


class ReferenceBlockMass(Impl):
    op, name, rank = "block_mass", "reference", 0

    def reasons(self, call: BlockMassCall) -> list[str]:
        return []

    def __call__(self, call: BlockMassCall) -> Tensor:
        work = _work_dtype(call.q.dtype)
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
