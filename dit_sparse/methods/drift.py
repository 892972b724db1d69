"""How far a sparse output has moved since it was last corrected.

The norm of ``S_t - S_t0`` over that of ``S_t0`` follows the same quotient of the dense output,
which is the error of reusing it, over layers, heads and time; on the embedded model mostly within a
tenth up to 0.5. One query in every block is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.rotation import Part


@dataclass(slots=True)
class Later:
    """A number that is computed on a device now and read on the host one call later.

    The copy runs beside what is queued afterwards. Reading it waits only for the work that was
    queued before it was made, which by then is done.
    """

    value: Tensor
    ready: torch.cuda.Event | None = None

    @classmethod
    def begin(cls, value: Tensor) -> Later:
        if not value.is_cuda:
            return cls(value)
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(host, event)

    def read(self) -> float:
        if self.ready is not None:
            self.ready.synchronize()
        return float(self.value)


def first_of_blocks(call: Call, out: Tensor, block: int) -> Tensor:
    """The first query of every video block of ``out``, ``[batch, blocks, heads, dim]``; a view."""
    return out[:, : video_blocks(call.layout, block) * block : block]


def keep_reference(call: Call, part: Part, out: Tensor, block: int) -> None:
    """Remembers the sparse output of what was refreshed.

    Args:
        call: The whole call, tokens ordered video first.
        part: What was refreshed.
        out: Sparse output of the whole call, not yet corrected.
        block: Tokens in a block.
    """
    sample = first_of_blocks(call, out, block)
    if part.call is call:
        call.memory["reference"] = sample.clone()
        return
    index = (slice(None), part.blocks, part.heads)
    call.memory["reference"][index] = sample[index]


def drift(call: Call, out: Tensor, block: int) -> Tensor:
    """Median over heads of ``|S_t - S_t0| / |S_t0|``, 0-d fp32; 0 where nothing was remembered.

    Args:
        call: The whole call, tokens ordered video first.
        out: Sparse output of the whole call, not yet corrected.
        block: Tokens in a block.
    """
    reference = call.memory["reference"].float()
    if reference.numel() == 0:
        return out.new_zeros((), dtype=torch.float32)
    moved = first_of_blocks(call, out, block).float() - reference
    over = (0, 1, 3)
    share = moved.square().sum(over) / reference.square().sum(over).clamp_min(1e-30)
    return call.heads.all_heads(share[None]).median().sqrt()
