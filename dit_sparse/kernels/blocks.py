"""The size of blocks whose kernels are the fastest on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.ops import compute_capability
from dit_sparse.mask import Block

# With fewer tokens blocks are few, and wide ones cost more quality than they save time.
FEWEST_TOKENS = 16_384


def fastest_block(q: Tensor) -> Block:
    """Tokens in a block, or in a (query, key) block, for queries ``[batch, tokens, heads, dim]``.

    (128, 64) where the kernel in Gluon computes 16 bit at head dim 128, on Hopper: it takes query
    blocks of 128, and blocks of 64 x 64 stay at half to two thirds of its speed. At head dim 64 it
    gains nothing. Everywhere else 64.
    """
    if not q.is_cuda or q.shape[1] < FEWEST_TOKENS or q.shape[-1] != 128:
        return 64
    if q.dtype not in (torch.bfloat16, torch.float16) or compute_capability(q.device) != (9, 0):
        return 64
    from dit_sparse.kernels.triton_common import gluon_module

    return 64 if isinstance(gluon_module("attention"), str) else (128, 64)
