"""Dense attention, as a baseline that is measured like every method, and its noise floor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_sparse.mask import BlockMask
from dit_sparse.methods.base import Call, Method
from dit_sparse.schedule import Phase


@dataclass(frozen=True)
class Dense(Method):
    """The model's own attention at every step, bit for bit; only measured."""

    name = "dense"

    def attend(self, call: Call) -> Tensor:
        call.record(Phase.DENSE)
        return call.dense()

    @classmethod
    def exact(cls) -> Dense:
        return cls()


@dataclass(frozen=True)
class FullMask(Method):
    """Every block of every head, computed by this package's kernels.

    Mathematically dense, numerically another summation order: what differs from :class:`Dense` at
    the end of a generation is the noise floor of any comparison with it.

    Attributes:
        block: Tokens in a block.
    """

    name = "full"
    block: int = 64

    def attend(self, call: Call) -> Tensor:
        mask = BlockMask.full(self.block, call.layout.tokens, call.q.device)
        call.record(Phase.SPARSE, mask)
        return call.attention(mask).out

    @classmethod
    def exact(cls) -> FullMask:
        return cls()
