"""The specification of banded attention: each head on its own, in its own token order."""

from __future__ import annotations

import torch

from dit_sparse.kernels.ops import Attended, AttentionCall, BandedCall, Impl, work_dtype
from dit_sparse.kernels.reference import ReferenceAttention


class ReferenceBanded(Impl):
    op, name, rank = "banded_attention", "reference", 0

    def reasons(self, call: BandedCall) -> list[str]:
        return []

    def __call__(self, call: BandedCall) -> Attended:
        batch, tokens, heads, _ = call.q.shape
        attend = ReferenceAttention()
        out = torch.zeros_like(call.q)
        work = work_dtype(call.q.dtype)
        lse = call.q.new_full((batch, heads, tokens), float("-inf"), dtype=work)
        for head, pattern in enumerate(call.bands.heads):
            if pattern.skip:
                continue
            q, k, v = (x[:, :, head : head + 1] for x in (call.q, call.k, call.v))
            key_valid = call.key_valid
            order = call.bands.ordering(pattern.order, q.device)
            if order is not None:
                q, k, v = (order.apply(x) for x in (q, k, v))
                key_valid = None if key_valid is None else order.apply(key_valid)
            mask = call.bands.block_mask((head,), q.device)
            found = attend(AttentionCall(q, k, v, mask, key_valid, call.scale))
            if order is not None:
                found = Attended(order.undo(found.out), order.undo(found.lse, 2))
            out[:, :, head], lse[:, head] = found.out[:, :, 0], found.lse[:, 0]
        return Attended(out, lse)
