"""Banded attention on the CPU, through block lists: one call for all heads of a token order.

The kernel behind it gathers blocks anyway, so knowing that they are contiguous would save nothing.
"""

from __future__ import annotations

import torch

from dit_sparse.kernels.cpu import CpuAttention
from dit_sparse.kernels.ops import Attended, AttentionCall, BandedCall, Impl, work_dtype


class CpuBanded(Impl):
    op, name, rank = "banded_attention", "cpu", 50

    def reasons(self, call: BandedCall) -> list[str]:
        return CpuAttention().reasons(AttentionCall(call.q, call.k, call.v, None, None, 1.0))

    def __call__(self, call: BandedCall) -> Attended:
        batch, tokens, heads, _ = call.q.shape
        out = torch.zeros(call.q.shape, dtype=call.q.dtype)
        work = work_dtype(call.q.dtype)
        lse = torch.full((batch, heads, tokens), float("-inf"), dtype=work)
        for name, group in call.bands.groups().items():
            order = call.bands.ordering(name, call.q.device)
            q, k, v = call.q, call.k, call.v
            if len(group) < heads:
                index = torch.tensor(group)
                q, k, v = (x.index_select(2, index) for x in (q, k, v))
            key_valid = call.key_valid
            if order is not None:
                q, k, v = (order.apply(x) for x in (q, k, v))
                key_valid = None if key_valid is None else order.apply(key_valid)
            mask = call.bands.block_mask(group)
            found = CpuAttention()(AttentionCall(q, k, v, mask, key_valid, call.scale))
            if order is not None:
                found = Attended(order.undo(found.out), order.undo(found.lse, 2))
            if len(group) == heads:
                return found
            out[:, :, list(group)], lse[:, list(group)] = found.out, found.lse
        return Attended(out, lse)
