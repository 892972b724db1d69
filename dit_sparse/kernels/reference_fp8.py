"""The specification of attention in 8 bits: a loop over batch and heads on rounded operands."""

from __future__ import annotations

import torch

from dit_sparse.kernels.fp8 import round_weights, rounded_scores, rounded_values
from dit_sparse.kernels.ops import FP8, Attended, AttentionCall, Impl, work_dtype


class ReferenceFp8(Impl):
    op, name, rank = "attention", "reference", 0
    precisions = FP8

    def reasons(self, call: AttentionCall) -> list[str]:
        if call.q.device.type != "cpu":
            return [f"emulates 8-bit products, which is slower than 16 bits on {call.q.device}"]
        return []

    def __call__(self, call: AttentionCall) -> Attended:
        """Runs on any device; :meth:`reasons` keeps ``auto`` from it where that is no help."""
        assert call.v is not None
        work = work_dtype(call.q.dtype)
        batch, q_len, heads, _ = call.q.shape
        q, k, lift = rounded_scores(call, work)
        values = call.v.to(work)
        if call.precision == "fp8_qkpv":
            values = rounded_values(call, work)
        out = torch.zeros(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        lse = torch.full((batch, heads, q_len), float("-inf"), dtype=work, device=call.q.device)
        if call.k.shape[1] == 0:
            return Attended(out, lse)
        for b in range(batch):
            for h in range(heads):
                seen = torch.ones(q_len, k.shape[1], dtype=torch.bool, device=k.device)
                if call.mask is not None:
                    rows, columns = call.mask.block
                    keep = call.mask.dense()
                    keep = keep[b % keep.shape[0], h % keep.shape[1]]
                    seen = keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
                    seen = seen[:q_len, : k.shape[1]]
                if call.key_valid is not None:
                    seen = seen & call.key_valid[b]
                scores = call.scale * (q[b, :, h] @ k[b, :, h].T)
                scores = scores.where(seen, float("-inf"))
                peak = scores.amax(-1, keepdim=True)
                peak = peak.where(peak > float("-inf"), 0.0)  # a row without keys
                weights = (scores - peak).exp()
                total = weights.sum(-1, keepdim=True)
                lse[b, h] = (total.log() + peak)[:, 0] + lift[b, h]
                if call.precision == "fp8_qkpv":
                    weights = round_weights(weights)
                # Values that nobody sees may be NaN.
                value = values[b, :, h].where(seen.any(0)[:, None], 0.0)
                result = weights @ value / total.where(total > 0, 1.0)
                out[b, :, h] = result.to(out.dtype)
        return Attended(out, lse)
