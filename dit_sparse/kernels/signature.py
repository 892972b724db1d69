"""What the choice of a kernel depends on, as keys of dictionaries.

Denoising makes the same call hundreds of times, with other numbers in tensors of the same shapes.
Whether it is valid, who computes it and how that is launched follow from shapes, strides, types,
devices and alignment, so they are found out once for each of these signatures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import BlockMask, PackedMask

# Signatures kept; beyond that all are forgotten, and found again one by one.
_MOST = 4096


class Settled(NamedTuple):
    """What was found for the calls of one signature.

    Attributes:
        impl: Who computes them.
        kept: What an implementation works out from the signature alone, by a name of its own.
    """

    impl: Any
    kept: dict[str, Any]


_settled: dict[tuple[Any, ...], Settled] = {}


def settled(key: tuple[Any, ...] | None) -> Settled | None:
    """What was found for ``key``; None if nothing was yet."""
    return None if key is None else _settled.get(key)


def settle(key: tuple[Any, ...] | None, impl: Any) -> Settled:
    """Remembers who computes the calls of ``key``, once that is certain."""
    found = Settled(impl, {})
    # While a CUDA graph is recorded, kernels that are tested before their first use refuse.
    if key is not None and not is_recording():
        if len(_settled) >= _MOST:
            _settled.clear()
        _settled[key] = found
    return found


def forget() -> None:
    """Forgets everything that was found."""
    _settled.clear()


def is_recording() -> bool:
    """Whether a CUDA graph is being recorded on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def has_signature(x: Tensor) -> bool:
    """Whether calls on ``x`` are remembered: elsewhere than on CUDA the host computes anyway."""
    return x.is_cuda


def of_tensor(x: Tensor | None) -> tuple[Any, ...] | None:
    """All of a tensor but its numbers, and its address within 16 bytes."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)


def of_mask(mask: BlockMask | PackedMask | None) -> tuple[Any, ...] | None:
    """All of a mask but its pattern."""
    if mask is None:
        return None
    if isinstance(mask, PackedMask):
        return mask.bits.shape, mask.longest, mask.block, mask.seq, mask.bits.device
    lists = mask.kv_indices
    return lists.shape, mask.block, mask.seq, lists.device


def of_summary(summary: BlockSummary | None) -> tuple[Any, ...] | None:
    """All of a summary but its numbers."""
    if summary is None:
        return None
    return (
        of_tensor(summary.key_mean),
        of_tensor(summary.value_mean),
        of_tensor(summary.count),
        of_tensor(summary.slope),
        of_tensor(summary.rounded),
    )
