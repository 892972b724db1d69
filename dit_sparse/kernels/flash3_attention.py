"""Dense attention with its log-sum-exp by FlashAttention-3 (package ``fa3-fwd``).

The fastest dense kernel on Hopper where it is installed: searches start from dense rows and their
LSE.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from dit_sparse.kernels.nvidia import device_reasons, dtype_reasons
from dit_sparse.kernels.ops import Attended, AttentionCall, Impl
from dit_sparse.kernels.probe import probe_reasons

# The forward-only wheel, and what a build from source installs.
_MODULES = {"fa3-fwd": "fa3_fwd_interface", "flash-attn-3": "flash_attn_interface"}


@lru_cache(maxsize=1)
def _library() -> Callable[..., Any] | str:
    """Its function, or why it cannot be used."""
    found = []
    for name in _MODULES.values():
        try:
            function = importlib.import_module(name).flash_attn_func
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            found.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
            continue
        if "return_attn_probs" in inspect.signature(function).parameters:
            return function
        found.append(f"this {name} cannot be asked for its LSE")
    return "; ".join(found)


def _attend(call: AttentionCall) -> Attended:
    library = _library()
    assert not isinstance(library, str)
    with torch.cuda.device_of(call.q), torch.no_grad():
        out, lse = library(
            call.q, call.k, call.v, softmax_scale=call.scale, return_attn_probs=True
        )[:2]
    return Attended(out, lse)


class FlashAttention3(Impl):
    op, name, rank = "attention", "flash-attn-3", 120
    packages = tuple(_MODULES)

    def reasons(self, call: AttentionCall) -> list[str]:
        if reasons := device_reasons(call.q, 9) or static_reasons(call):
            return reasons
        library = _library()
        if isinstance(library, str):
            return [library]
        return probe_reasons(self.name, _attend, call)

    def __call__(self, call: AttentionCall) -> Attended:
        return _attend(call)


def static_reasons(call: AttentionCall) -> list[str]:
    """Why the kernel cannot compute ``call`` on any device."""
    reasons = dtype_reasons(call.q)
    if call.q.shape[-1] % 8 or call.q.shape[-1] > 256:
        reasons.append(f"head dim must be a multiple of 8 up to 256, got {call.q.shape[-1]}")
    if call.mask is not None or call.key_valid is not None:
        reasons.append("computes dense attention without a mask or padding")
    if call.scale <= 0:
        reasons.append(f"scale must be positive, got {call.scale}")
    if call.q.numel() == 0 or call.k.numel() == 0:
        reasons.append("takes no empty sequence")
    return reasons
