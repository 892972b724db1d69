"""Padding as the Triton kernels read it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.triton_launch import launch_kernel

_CHUNK = 8192


@triton.jit
def _prefix_kernel(
    flags,  # [batch, tokens] uint8, contiguous
    prefix,  # [batch] int32
    tokens,
    CHUNK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    first = tokens
    for start in range(0, tokens, CHUNK):
        at = start + tl.arange(0, CHUNK)
        valid = tl.load(flags + batch * tokens + at, mask=at < tokens, other=1)
        first = tl.minimum(first, tl.min(tl.where(valid == 0, at, tokens), 0))
    tl.store(prefix + batch, first)


def validity(key_valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The padding mask as the kernels read it.

    Args:
        key_valid: ``[batch, kv_len]`` bool or None.

    Returns:
        The mask as uint8 ``[batch, kv_len]``, and the number of keys before the first invalid one,
        ``[batch]`` int32: blocks inside this prefix take the path without masking.
    """
    if key_valid is None:
        return None, None
    flags = key_valid.contiguous().view(torch.uint8)
    batch, tokens = flags.shape
    prefix = flags.new_empty(batch, dtype=torch.int32)
    if batch:
        launch_kernel(
            _prefix_kernel, (batch,), (flags, prefix), (tokens,), CHUNK=_CHUNK, num_warps=8
        )
    return flags, prefix
