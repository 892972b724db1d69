"""The first product in 8 bits on the CPU: the CPU's kernel on rounded queries and keys.

For measuring what the rounding costs; nothing is faster here. Weights are rounded inside a kernel,
so ``"fp8_qkpv"`` is the reference's.
"""

from __future__ import annotations

from dataclasses import replace

from dit_sparse.kernels.cpu import CpuAttention
from dit_sparse.kernels.fp8 import rounded_scores
from dit_sparse.kernels.ops import Attended, AttentionCall, work_dtype


class CpuFp8(CpuAttention):
    precisions = ("fp8_qk",)

    def __call__(self, call: AttentionCall) -> Attended:
        assert call.v is not None
        work = work_dtype(call.q.dtype)
        q, k, lift = rounded_scores(call, work)
        rounded = replace(call, q=q, k=k, v=call.v.to(work), precision="model")
        out, lse, _ = super().__call__(rounded)
        return Attended(out.to(call.q.dtype), lse + lift)
