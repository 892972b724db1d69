"""TMA boxes of tensors as the kernels in Gluon take them, and what they need to know of a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_sparse.kernels.triton_common import last_contiguous
from dit_sparse.kernels.triton_launch import BoxShape

# Their names from triton 3.9 on; there the old ones still exist, and raise.
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_KINDS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU: as many persistent programs run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def strides(tensor: Tensor) -> list[int]:
    """Strides of ``tensor``; where there is one element only, any will do."""
    return [
        tensor.shape[-1] if size == 1 and place < tensor.ndim - 1 else step
        for place, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    ]


def box_reasons(name: str, tensor: Tensor) -> list[str]:
    """Why TMA cannot read ``tensor``, called ``name``, once its last dimension is contiguous."""
    tensor = last_contiguous(tensor)
    found = [f"{name} is empty"] if tensor.numel() == 0 else []
    steps = [s * tensor.element_size() for s in strides(tensor)[:-1]]
    if tensor.data_ptr() % 16 or any(s % 16 or s == 0 for s in steps):
        found.append(f"{name} is not aligned to 16 bytes, or expanded")
    return found


def box_shape(tensor: Tensor, box: list[int]) -> BoxShape:
    """Boxes of a tensor with as many axes."""
    layout = gl.NVMMASharedLayout.get_default_for(box, _KINDS[tensor.dtype])
    shape = list(tensor.shape)
    return BoxShape(TensorDescriptor, tensor.dtype, shape, strides(tensor), box, layout)


def head_boxes(tensor: Tensor, rows: int) -> BoxShape:
    """Boxes of ``rows`` tokens of one head of ``[batch, tokens, heads, dim]``."""
    return box_shape(tensor.transpose(1, 2), [1, 1, rows, tensor.shape[-1]])
