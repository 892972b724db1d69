"""The numeric test of :mod:`dit_sparse.kernels.probe` for kernels that compute block mass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.ops import BlockMassCall, block_mass, row_lse
from dit_sparse.kernels.probe import reasons, worst

# Longer than what kernels gather before they store, and ragged.
_SEQ = (300, 4301)


@dataclass(frozen=True)
class MassClass:
    """Calls that a kernel computes by the same code.

    Attributes:
        device: Where.
        dtype: Of q and k.
        dim: Head dimension.
        block: Tokens in a (query, key) block.
        padded: Whether some keys do not exist.
    """

    device: torch.device
    dtype: torch.dtype
    dim: int
    block: tuple[int, int]
    padded: bool = False

    @classmethod
    def of(cls, call: BlockMassCall) -> MassClass:
        """The class of ``call``; looks at shapes and types alone."""
        q = call.q
        return cls(q.device, q.dtype, q.shape[-1], call.block, call.key_valid is not None)

    def example(self) -> BlockMassCall:
        """A small call of this class, always the same one, with rows that have no keys."""
        rng = torch.Generator().manual_seed(0)
        batch, heads, scale = 2, 2, self.dim**-0.5
        q, k = (
            torch.randn(batch, n, heads, self.dim, generator=rng).to(self.device, self.dtype)
            for n in _SEQ
        )
        key_valid = None
        if self.padded:
            key_valid = torch.ones(batch, _SEQ[1], dtype=torch.bool)
            key_valid[0, 3000:] = False
            key_valid[1, 150] = False
            key_valid = key_valid.to(self.device)
            k.masked_fill_(~key_valid[..., None, None], float("nan"))
        wide = q.double(), k.double()
        lse = row_lse(*wide, key_valid=key_valid, scale=scale, impl="reference").float()
        lse[:, 0, 100:110] = float("-inf")
        return BlockMassCall(q, k, lse, self.block, key_valid, scale)


def mass_reasons(
    name: str, run: Callable[[BlockMassCall], Tensor], call: BlockMassCall
) -> list[str]:
    """:func:`~dit_sparse.kernels.probe.probe` for the class of ``call``, as reasons."""
    return reasons(name, run, MassClass.of(call), mass_disagreement)


def mass_disagreement(run: Callable[[BlockMassCall], Tensor], kind: MassClass) -> str | None:
    """How ``run`` differs from the fp64 reference on the example of ``kind``; None if it does not.

    No tolerance is set by hand: the error may be twice that of the same formula in fp32 plus what
    rounding does to scores of this size. Waits for the device.
    """
    call = kind.example()
    found = run(call)

    def reference(dtype: torch.dtype) -> Tensor:
        q, k, lse = call.q.to(dtype), call.k.to(dtype), call.lse.to(dtype)
        return block_mass(
            q, k, lse, call.block, key_valid=call.key_valid, scale=call.scale, impl="reference"
        )

    truth, eager = reference(torch.float64), reference(torch.float32)
    if found.shape != truth.shape:
        return f"its result is {tuple(found.shape)} where {tuple(truth.shape)} is right"
    q, k = (x.float().nan_to_num(0.0).abs().transpose(1, 2) for x in (call.q, call.k))
    size = call.scale * float((q @ k.mT).max())
    # An error e of a score changes its weight by the factor 1 + e.
    rounding = torch.finfo(torch.float32).eps * (1 + size) * float(truth.max())
    error, budget = worst(found, truth), 2 * (worst(eager, truth) + rounding)
    if not error <= budget:
        return f"its mass is off by {error:.1e} where at most {budget:.1e} is right"
    return None
