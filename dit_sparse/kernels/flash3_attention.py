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

from dit_sparse.kernels.ops import Attended, AttentionCall, Impl, compute_capability
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
        reasons = []
        if not call.q.is_cuda or torch.version.hip is not None:
            return [f"needs an NVIDIA device, got {call.q.device}"]
        capability = compute_capability(call.q.device)
        if capability[0] != 9:
            found = f"{capability[0]}.{capability[1]}"
            reasons.append(f"is chosen for compute capability 9.0, got {found}")
        reasons += static_reasons(call)
        if reasons:
            return reasons
        library = _library()
        if isinstance(library, str):
            return [library]
        return probe_reasons(self.name, _attend, call)

    def __call__(self, call: AttentionCall) -> Attended:
        return _attend(call)


def static_reasons(call: AttentionCall) -> list[str]:
    """Why the kernel cannot compute ``call`` on any device."""
    reasons = []
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {call.q.dtype}")
    if call.q.shape[-1] % 8 or call.q.shape[-1] > 256:
        reasons.append(f"head dim must be a multiple of 8 up to 256, got {call.q.shape[-1]}")
    if call.mask is not None or call.key_valid is not None:
        reasons.append("computes dense attention without a mask or padding")
    if call.scale <= 0:
        reasons.append(f"scale must be positive, got {call.scale}")
    if call.q.numel() == 0 or call.k.numel() == 0:
        reasons.append("takes no empty sequence")
    return reasons
