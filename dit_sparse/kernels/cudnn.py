"""Dense attention with its log-sum-exp by cuDNN, the fastest dense kernel of torch on Hopper.

The rows that a method refreshes are dense and need their LSE; on an H100 cuDNN computes them nearly
twice as fast as torch's flash kernel or the Triton kernel of this package.
"""

from __future__ import annotations

import torch

from dit_sparse.kernels.native_lse import cudnn_attention_with_lse
from dit_sparse.kernels.nvidia import device_reasons, dtype_reasons
from dit_sparse.kernels.ops import Attended, AttentionCall, Impl

# Above Triton's, which stays ahead for everything that has a mask.
_RANK = 110


class CudnnAttention(Impl):
    op, name, rank = "attention", "cudnn", _RANK

    def reasons(self, call: AttentionCall) -> list[str]:
        if reasons := device_reasons(call.q, 9, newer=True):
            return reasons
        reasons = dtype_reasons(call.q)
        if not torch.backends.cudnn.is_available():
            reasons.append("torch was built without cuDNN")
        if call.q.shape[-1] % 8 or call.q.shape[-1] > 128:
            reasons.append(f"head dim must be a multiple of 8 up to 128, got {call.q.shape[-1]}")
        if call.mask is not None or call.key_valid is not None:
            reasons.append("computes dense attention without a mask or padding")
        if call.q.numel() == 0 or call.k.numel() == 0:
            reasons.append("takes no empty sequence")
        return reasons

    def __call__(self, call: AttentionCall) -> Attended:
        assert call.v is not None
        query, key, value = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        out, lse = cudnn_attention_with_lse(query, key, value, call.scale)
        return Attended(out.transpose(1, 2), lse)
