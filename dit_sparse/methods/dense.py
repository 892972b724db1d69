"""Dense attention, as a baseline that is measured like every method, and its noise floor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_sparse.kernels.ops import merge
from dit_sparse.mask import BlockMask
from dit_sparse.methods.base import Call, Method
from dit_sparse.schedule import Phase


@dataclass(frozen=True)
class Dense(Method):
    """The model's own attention at every step, bit for bit; only measured."""

    name = "dense"
    splits_heads = True

    def attend(self, call: Call) -> Tensor:
        call.record(Phase.DENSE)
        return call.dense()

    @classmethod
    def exact(cls) -> Dense:
        return cls()


@dataclass(frozen=True)
class FullMask(Method):
    """Every block of every head, computed by this package's kernels in two halves and merged.

    Mathematically dense, numerically another summation order: what differs from :class:`Dense` at
    the end of a generation is the noise floor of any comparison with it. The halves (even and odd
    key blocks) make sure that the sparse path is taken and that no kernel recognises a full mask
    and computes the very same sums.

    Attributes:
        block: Tokens in a block.
    """

    name = "full"
    splits_heads = True
    block: int = 64

    def attend(self, call: Call) -> Tensor:
        full = BlockMask.full(self.block, call.layout.tokens, call.q.device)
        call.record(Phase.SPARSE, full.pack())
        keep = full.dense()
        keep[..., 1::2] = False
        even = BlockMask.from_dense(keep, full.block, full.seq)
        return merge(call.attention(even), call.attention(~even)).out

    @classmethod
    def exact(cls) -> FullMask:
        return cls()
