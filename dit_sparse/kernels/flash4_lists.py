"""Block lists as FlashAttention-4 reads them: one list of whole and one of partial key blocks.

In its block sparsity (``flash_attn/cute/block_sparsity.py``) a *full* block is computed without a
mask and a *mask* block under a function of the key's position. Both lists are walked from their
end, and the end of the key sequence is masked in the block of a list that is walked first; with
ascending lists that is the ragged last block wherever it is kept, so it needs no function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.mask import BlockMask, block_count, block_sizes


class FlashLists(NamedTuple):
    """Whole and partial key blocks of every query block, in ascending order.

    Entries past a count are undefined. The batch and head dimensions are those of the call: shared
    lists are expanded with stride 0.

    Attributes:
        mask_counts: Blocks with padded keys among their keys, ``[batch, heads, q_blocks]`` int32.
        mask_indices: Which, ``[batch, heads, q_blocks, 1..kv_blocks]`` int32.
        full_counts: Blocks whose keys all exist, shape as ``mask_counts``.
        full_indices: Which, as ``mask_indices``.
    """

    mask_counts: Tensor
    mask_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


def flash_lists(mask: BlockMask, batch: int, heads: int, key_valid: Tensor | None) -> FlashLists:
    """Converts ``mask``; stays on its device and does not wait for it.

    Kept blocks without a single real key are dropped.

    Args:
        mask: Kept blocks; its batch and heads may be 1.
        batch: Batch of the call.
        heads: Heads of the call.
        key_valid: Keys that exist, ``[batch, kv_len]`` bool, or None for all.
    """
    counts, indices = mask.kv_num_blocks.contiguous(), mask.kv_indices.contiguous()
    if key_valid is None:
        rows = counts.shape[2]
        nothing = torch.zeros(batch, heads, rows, 1, dtype=torch.int32, device=mask.device)
        return FlashLists(
            nothing[..., 0],
            nothing,
            counts.expand(batch, heads, rows),
            indices.expand(batch, heads, *indices.shape[2:]),
        )
    block, (_, kv_len) = mask.block[1], mask.seq
    columns = block_count(kv_len, block)
    padded = torch.nn.functional.pad(key_valid, (0, columns * block - kv_len))
    real = padded.view(batch, columns, block).sum(-1)
    whole = real == block_sizes(kv_len, block, mask.device)
    partial = (real > 0) & ~whole

    shape = (batch, heads if counts.shape[1] > 1 else 1, *indices.shape[2:])
    live = torch.arange(indices.shape[-1], device=mask.device) < counts.unsqueeze(-1)
    # Undefined entries may hold anything; block 0 is looked up in their place and not used.
    listed = indices.where(live, 0).expand(shape)
    flat = listed.reshape(batch, -1).long()
    found = []
    for kind in (partial, whole):
        chosen = kind.gather(1, flat).view(shape) & live
        place = chosen.cumsum(-1)
        # What is not chosen goes to a place past the end, which is cut off.
        target = (place - 1).where(chosen, shape[-1])
        packed = torch.zeros(*shape[:3], shape[-1] + 1, dtype=torch.int32, device=mask.device)
        packed.scatter_(-1, target, listed)
        found += [
            place[..., -1].int().expand(batch, heads, -1),
            packed[..., :-1].contiguous().expand(batch, heads, -1, -1),
        ]
    return FlashLists(*found)
