"""Methods that leave the size of their blocks to the call."""

from __future__ import annotations

import abc
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from torch import Tensor

from dit_sparse.kernels.blocks import fastest_block
from dit_sparse.mask import Block, block_sides
from dit_sparse.methods.base import Call, Method, check_block


class AutoBlock(Method):
    """A method with a field ``block`` that may be ``"auto"``: what is fastest for each call."""

    block: Block | Literal["auto"]

    def attend(self, call: Call) -> Tensor:
        return (self._settled(call) if self.block == "auto" else self)._attend(call)

    @abc.abstractmethod
    def _attend(self, call: Call) -> Tensor:
        """:meth:`attend` with blocks of a known size."""

    def _settled(self, call: Call) -> AutoBlock:
        """This method with the blocks that are the fastest for ``call``."""
        block = fastest_block(call.q)
        if block != 64:
            queries, keys = block_sides(block)
            call.notes["blocks"] = (
                f"blocks of {queries} queries and {keys} keys, the fastest on this device; "
                "block=64 is nearer to dense and slower"
            )
        return _with_block(self, block)

    def _check_block(self) -> None:
        """Raises ValueError if ``block`` is neither a size that kernels walk nor ``"auto"``."""
        if self.block != "auto":
            check_block(self.block)

    @property
    def _sides(self) -> tuple[int, int]:
        """Tokens in a query and in a key block."""
        assert self.block != "auto"
        return block_sides(self.block)


@lru_cache(maxsize=64)
def _with_block(method: AutoBlock, block: Block) -> AutoBlock:
    return replace(method, block=block)  # type: ignore[call-arg]
