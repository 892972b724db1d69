"""What methods share that find a block mask by some cheap score: each is then its formula.

The skeleton: a dense warm-up; then, every few steps, :meth:`BlockMasked.find` chooses which video
blocks see which, and attention runs under that mask until the next search. Text blocks, and the
block that mixes text and video, are kept as rows and as columns, so that text conditioning stays
exact; they are charged to no budget.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_sparse.layout import Ordering
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import Call, Method, check_box, video_blocks
from dit_sparse.methods.estimates import best_blocks
from dit_sparse.schedule import Cadence, Phase


@dataclass(frozen=True, kw_only=True)
class BlockMasked(Method):
    """Attention under a block mask that is found once a generation.

    Attributes:
        warmup: Dense steps at the start, a count or a share of all steps.
        block: Tokens in a query and a key block, 64 or 128.

    Raises:
        ValueError: On a value outside these ranges.
    """

    # Methods of this kind treat heads one by one; one that does not says so.
    splits_heads = True

    warmup: int | float = 0.2
    block: int = 64

    def __post_init__(self) -> None:
        self.cadence()
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")

    def cadence(self) -> Cadence:
        """When masks are found."""
        return Cadence(self.warmup, None)

    def order(self, call: Call) -> Ordering | None:
        """The order of the tokens, text last, in which masks are found and used."""
        return call.tile_order(None)

    @abc.abstractmethod
    def find(self, call: Call) -> PackedMask:
        """The mask of ``call``, which has its tokens in :meth:`order` and a video block or more."""

    def attend(self, call: Call) -> Tensor:
        phase = self.cadence().phase(call.step, call.memory.get("found"))
        if phase is Phase.DENSE:
            call.record(phase)
            return call.dense()
        order = self.order(call)
        moved = call.ordered(order)
        if phase is Phase.REFRESH:
            stop = call.search_watch.start(call.q.device)
            if video_blocks(call.layout, self.block):
                call.memory["mask"] = self.find(moved)
            else:
                call.memory["mask"] = self.pack(moved, call.q.new_ones((1, 1, 0, 0)).bool())
            call.memory["found"] = call.step.index
            stop()
        mask = call.memory["mask"]
        call.record(phase, mask)
        out = self.attention(moved, mask)
        return out if order is None else order.undo(out)

    def pack(self, call: Call, keep: Tensor, most: int | None = None) -> PackedMask:
        """The mask that keeps ``keep`` and, as rows and as columns, everything with text.

        Args:
            call: With its tokens in :meth:`order`.
            keep: Video key blocks that each video query block keeps,
                ``[batch | 1, heads | 1, video_blocks, video_blocks]`` bool.
            most: Upper bound of the blocks that a row of ``keep`` has, on the host; None if not
                known.
        """
        total, video = block_count(call.layout.tokens, self.block), keep.shape[-1]
        whole = keep.new_ones((*keep.shape[:2], total, total))
        whole[..., :video, :video] = keep
        longest = None if call.layout.text else most
        return PackedMask.from_dense(whole, self.block, call.layout.tokens, longest)

    def attention(self, call: Call, mask: PackedMask) -> Tensor:
        """Attention ``[batch, tokens, heads, dim]`` of ``call``, its tokens in :meth:`order`."""
        return call.attention(mask).out


@dataclass(frozen=True, kw_only=True)
class Tiled(BlockMasked):
    """In the order of tiles.

    Attributes:
        tile: Order of the video tokens: (frames, height, width) of a tile that becomes one run, or
            None for raster order.
    """

    tile: tuple[int, int, int] | None = (4, 4, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_box("tile", self.tile)

    def order(self, call: Call) -> Ordering | None:
        return call.tile_order(self.tile)


@dataclass(frozen=True, kw_only=True)
class BlockSearched(BlockMasked):
    """Attention under a block mask that depends on the input and is found anew every few steps.

    Attributes:
        every: Steps that a mask serves.
    """

    every: int = 1

    def cadence(self) -> Cadence:
        return Cadence(self.warmup, self.every)


@dataclass(frozen=True)
class BlockScored(Tiled, BlockSearched):
    """Every query block keeps the ``round((1 - sparsity) * N)`` of N video blocks scored highest.

    The query block's own place is among them: attention peaks there more often than a cheap score
    can tell, and no row is ever empty.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1).
    """

    sparsity: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity, least=0, below=1)

    @classmethod
    def exact(cls) -> BlockScored:
        return cls(sparsity=0.0, warmup=0)

    @abc.abstractmethod
    def scores(self, call: Call) -> Tensor:
        """How much each video query block wants each video key block; only the order matters.

        Args:
            call: With its tokens in :meth:`order`.

        Returns:
            ``[batch | 1, heads | 1, video_blocks, video_blocks]``, not negative; 0 for a key block
            that does not exist (padding).
        """

    def find(self, call: Call) -> PackedMask:
        return best_blocks(call, self.scores(call), self.sparsity, self.block)


def check_share(name: str, value: Any, least: float, below: float | None = None) -> None:
    """Refuses what is not a number in [least, 1], or in [least, below) where that is given."""
    upper = "1]" if below is None else f"{below:g})"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (least <= value < below if below is not None else least <= value <= 1):
        raise ValueError(f"{name} must be a number in [{least:g}, {upper}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Refuses what is not an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
