"""What kernels of NVIDIA's own and of FlashAttention ask of device and dtype, in the same words."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.ops import compute_capability


def device_reasons(tensor: Tensor, major: int, *, newer: bool = False) -> list[str]:
    """Why a kernel is not used on the device of ``tensor``; empty if it is.

    Args:
        tensor: An operand of the kernel.
        major: The kernel is used on compute capability ``major``.x.
        newer: And on all newer ones.
    """
    if not tensor.is_cuda or torch.version.hip is not None:
        rocm = " of ROCm" if tensor.is_cuda else ""
        return [f"needs an NVIDIA device, got {tensor.device}{rocm}"]
    found = compute_capability(tensor.device)
    if found[0] == major or (newer and found[0] > major):
        return []
    wanted = f"{major}.0 and newer" if newer else f"{major}.x only"
    return [f"is used on compute capability {wanted}, got {found[0]}.{found[1]}"]


def dtype_reasons(tensor: Tensor) -> list[str]:
    """Why ``tensor`` has no dtype of 16 bits; empty if it has one."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return []
    return [f"dtype must be bfloat16 or float16, got {tensor.dtype}"]
