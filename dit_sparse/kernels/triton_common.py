"""What the Triton kernels share: when they refuse, and how the launchers prepare operands."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.ops import compute_capability

LOG2_E = 1.4426950408889634
MASK_BLOCKS = (64, 128)
MAX_DIM = 256


@triton.jit
def _probe():
    tl.static_assert(True)


# Set when triton was imported with TRITON_INTERPRET=1: the kernels then run on CPU tensors.
INTERPRETED = not isinstance(_probe, triton.JITFunction)
# The interpreter is for tests: then impl="auto" prefers even the reference, which is faster.
RANK = -1 if INTERPRETED else 100


def refusals(q: Tensor, block: tuple[int, int] | None) -> list[str]:
    """Why no Triton kernel of this package can take queries ``q`` with mask blocks ``block``.

    Args:
        q: Queries ``[batch, q_len, heads, dim]``.
        block: Tokens in a (query, key) block, or None for a call without blocks.
    """
    reasons = []
    if INTERPRETED:
        if q.device.type != "cpu":
            reasons.append(f"TRITON_INTERPRET=1 runs on CPU tensors, got {q.device}")
        if q.dtype == torch.bfloat16:
            # It multiplies the 16-bit patterns as integers (triton 3.9).
            reasons.append("the interpreter of triton has no bfloat16 matrix product")
    elif q.device.type != "cuda":
        reasons.append(f"needs a CUDA device (or TRITON_INTERPRET=1), got {q.device}")
    elif torch.version.hip is None and compute_capability(q.device) < (8, 0):
        found = compute_capability(q.device)
        reasons.append(f"needs compute capability 8.0 or newer, got {found[0]}.{found[1]}")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reasons.append(f"dtype must be bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] > MAX_DIM:
        reasons.append(f"head dim must be at most {MAX_DIM}, got {q.shape[-1]}")
    if block is not None and not set(block) <= set(MASK_BLOCKS):
        reasons.append(f"query and key blocks must each be one of {MASK_BLOCKS}, got {block}")
    return reasons


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability by which launch parameters are chosen; in the interpreter that of H100."""
    return (9, 0) if INTERPRETED else compute_capability(tensor.device)


@cache
def gluon_module(name: str) -> Any:
    """A module of :mod:`dit_sparse.kernels.gluon`, or why it cannot be loaded: calls ask for it."""
    try:
        return importlib.import_module(f"dit_sparse.kernels.gluon.{name}")
    except (ImportError, AttributeError) as error:
        # An experiment of triton's, which moves between its versions.
        return f"this version of triton lacks it ({error})"


def gluon_reasons(name: str, call: Any) -> list[str]:
    """Why ``call``, which has queries, cannot go to a kernel in Gluon for Hopper; empty if it can.

    Args:
        name: Its module, whose ``reasons`` are asked once it can be loaded.
        call: The call.
    """
    if INTERPRETED:
        return ["Gluon has no interpreter"]
    if capability(call.q) != (9, 0):
        return ["needs compute capability 9.0"]
    module = gluon_module(name)
    return [module] if isinstance(module, str) else module.reasons(call)


def padded_dim(dim: int) -> int:
    """Width of the register tile that holds ``dim`` columns: a power of two, at least 16."""
    return max(16, power_of_two(dim))


# Triton's own of these two take a microsecond, of the few that a launch should take.
def power_of_two(n: int) -> int:
    """The least power of two that is ``n`` or more."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def last_contiguous(tensor: Tensor) -> Tensor:
    """``tensor`` itself if its last dimension has stride 1, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_float(tensor: Tensor) -> Tensor:
    """``tensor`` itself if it is contiguous fp32, otherwise such a copy."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.float().contiguous()
