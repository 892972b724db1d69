"""Which blocks of the attention matrix are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

# Tokens in a block: one number for queries and keys, or (queries, keys).
Block = int | tuple[int, int]


def block_sides(block: Block) -> tuple[int, int]:
    """Tokens in a query block and in a key block."""
    return (block, block) if isinstance(block, int) else block


def block_count(tokens: int, block: int) -> int:
    """Number of blocks of ``block`` tokens that cover ``tokens``; the last one may be ragged."""
    return -(-tokens // block)


def block_sizes(tokens: int, block: int, device: torch.device | None = None) -> Tensor:
    """Real tokens in each block, ``[blocks]`` int64; all are ``block`` but perhaps the last."""
    starts = torch.arange(block_count(tokens, block), device=device) * block
    return (tokens - starts).clamp(max=block)


@dataclass(frozen=True, slots=True, eq=False)
class BlockMask:
    """A block-sparse attention pattern: one list of key blocks for each query block.

    The token-level mask that it stands for is::

        for row in range(q_blocks):
            for n in range(kv_num_blocks[b, h, row]):
                col = kv_indices[b, h, row, n]
                keep[b, h, row * block[0] : (row + 1) * block[0],
                           col * block[1] : (col + 1) * block[1]] = True

    cut off at ``seq``: the last block of either axis may be ragged. Entries of ``kv_indices`` past
    the count are undefined and must not be read. A dense head lists every block; a skipped head
    lists none (its output is 0 and its LSE ``-inf``).

    Attributes:
        kv_num_blocks: Key blocks kept by each query block, ``[batch | 1, heads | 1, q_blocks]``
            int32.
        kv_indices: Kept key blocks in ascending order,
            ``[batch | 1, heads | 1, q_blocks, max_blocks]`` int32.
        block: Tokens in a query block and in a key block.
        seq: Tokens of the query and of the key sequence.
        bits: The same pattern at one bit a block, see :class:`PackedMask`, or None. Kernels that
            need to know which blocks a row skips read it.

    Source: the list half of FlexAttention's ``BlockMask`` (torch.nn.attention.flex_attention),
    forward only and with every listed block computed in full.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    block: tuple[int, int]
    seq: tuple[int, int]
    bits: Tensor | None = None

    def __post_init__(self) -> None:
        rows = block_count(self.seq[0], self.block[0])
        counts, indices = tuple(self.kv_num_blocks.shape), tuple(self.kv_indices.shape)
        if len(counts) != 3 or len(indices) != 4 or indices[:3] != counts or counts[2] != rows:
            raise ValueError(
                "BlockMask expects kv_num_blocks [batch, heads, q_blocks] and kv_indices [batch, "
                f"heads, q_blocks, max_blocks] with q_blocks = {rows} ({self.seq[0]} tokens in "
                f"blocks of {self.block[0]}), got {counts} and {indices}"
            )

    @classmethod
    def from_dense(
        cls, keep: Tensor, block: tuple[int, int] | int, seq: tuple[int, int] | int
    ) -> BlockMask:
        """Builds the lists from a boolean matrix of blocks.

        Args:
            keep: ``[batch | 1, heads | 1, q_blocks, kv_blocks]`` bool.
            block: Tokens in a (query, key) block; one int for both.
            seq: Tokens of the (query, key) sequence; one int for both.

        Raises:
            ValueError: If ``keep`` is not boolean, or its block counts do not cover ``seq``.
        """
        block, seq = _pairs(block, seq)
        _check_keep(keep, block, seq)
        return cls(*_lists(keep, keep.shape[-1]), block, seq)

    @classmethod
    def full(
        cls,
        block: tuple[int, int] | int,
        seq: tuple[int, int] | int,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The mask that keeps everything, for all batch elements and heads."""
        block, seq = _pairs(block, seq)
        shape = (1, 1, block_count(seq[0], block[0]), block_count(seq[1], block[1]))
        return cls.from_dense(torch.ones(shape, dtype=torch.bool, device=device), block, seq)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch | 1, heads | 1, q_blocks, kv_blocks)``."""
        batch, heads, rows = self.kv_num_blocks.shape
        return batch, heads, rows, block_count(self.seq[1], self.block[1])

    @property
    def device(self) -> torch.device:
        return self.kv_indices.device

    def to(self, device: torch.device | str) -> BlockMask:
        bits = None if self.bits is None else self.bits.to(device)
        return BlockMask(
            self.kv_num_blocks.to(device), self.kv_indices.to(device), self.block, self.seq, bits
        )

    def lists(self) -> BlockMask:
        """Itself; the twin of :meth:`PackedMask.lists`."""
        return self

    def pack(self) -> PackedMask:
        """The same pattern at one bit a block, for keeping."""
        return PackedMask.from_dense(self.dense(), self.block, self.seq)

    def packed_bits(self) -> Tensor:
        """:attr:`bits`; where they were not given they are made now, and kept."""
        if self.bits is not None:
            return self.bits
        bits = self.pack().bits
        # What is made while a CUDA graph is recorded is there only when the graph has run.
        if not (bits.is_cuda and torch.cuda.is_current_stream_capturing()):
            object.__setattr__(self, "bits", bits)
        return bits

    def nbytes(self) -> int:
        """Bytes that the lists occupy."""
        return sum(t.numel() * t.element_size() for t in (self.kv_num_blocks, self.kv_indices))

    def dense(self) -> Tensor:
        """The kept blocks as bool ``[batch | 1, heads | 1, q_blocks, kv_blocks]``."""
        listed = torch.arange(self.kv_indices.shape[-1], device=self.device)
        live = listed < self.kv_num_blocks.unsqueeze(-1)
        columns = self.shape[-1]
        # Undefined entries are sent to a column past the end, which is then cut off.
        target = torch.where(live, self.kv_indices, columns).long()
        keep = torch.zeros(*self.shape[:3], columns + 1, dtype=torch.bool, device=self.device)
        return keep.scatter_(-1, target, True)[..., :columns]

    def tokens(self) -> Tensor:
        """The kept pairs as bool ``[batch | 1, heads | 1, q_len, kv_len]``; for tests only."""
        keep = self.dense().repeat_interleave(self.block[0], -2)
        return keep.repeat_interleave(self.block[1], -1)[..., : self.seq[0], : self.seq[1]]

    def head_density(self) -> Tensor:
        """Kept pairs over all pairs of *real* tokens, fp32 ``[batch | 1, heads | 1]``.

        Ragged blocks count with the tokens they hold, so the value is exact and in [0, 1].
        """
        return _density(self.dense(), self.block, self.seq)

    def density(self) -> float:
        """Mean of :meth:`head_density` over batch and heads. Reads back from the device."""
        return float(self.head_density().mean())

    def _combined(self, other: BlockMask, keep: Tensor) -> BlockMask:
        if (self.block, self.seq) != (other.block, other.seq):
            raise ValueError(
                "masks combine only over the same blocks and tokens, got "
                f"{self.block} over {self.seq} and {other.block} over {other.seq}"
            )
        return BlockMask.from_dense(keep, self.block, self.seq)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, self.dense() | other.dense())

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, self.dense() & other.dense())

    def __invert__(self) -> BlockMask:
        return BlockMask.from_dense(~self.dense(), self.block, self.seq)

    def __bool__(self) -> bool:
        raise TypeError(
            "the truth value of a BlockMask is ambiguous; combine masks with & and |, "
            "and compare mask.density() for emptiness"
        )

    def __str__(self) -> str:
        """Draws the first head of the first batch element, at most 32 rows and 64 columns."""
        batch, heads, rows, columns = self.shape
        first = self.dense()[0, 0].float()
        height, width = min(rows, 32), min(columns, 64)
        picture = torch.nn.functional.adaptive_avg_pool2d(first[None], (height, width))[0]
        shades = " ░▒▓█"
        lines = [
            "".join(shades[math.ceil(value * (len(shades) - 1))] for value in row)
            for row in picture.tolist()
        ]
        head = (
            f"BlockMask(batch={batch}, heads={heads}, seq={self.seq}, block={self.block}, "
            f"density={self.density():.3f})"
        )
        return "\n".join([head, *lines])

    def to_flex(self) -> FlexBlockMask:
        """This pattern as a FlexAttention ``BlockMask``, every listed block a full one."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        return FlexBlockMask.from_kv_blocks(
            torch.zeros_like(self.kv_num_blocks),
            self.kv_indices,
            self.kv_num_blocks,
            self.kv_indices,
            BLOCK_SIZE=self.block,
            seq_lengths=self.seq,
        )


@dataclass(frozen=True, slots=True, eq=False)
class PackedMask:
    """A :class:`BlockMask` at one bit a block, the form in which masks are kept between steps.

    At 119,056 tokens (HunyuanVideo 720p) in blocks of 64 the masks of all heads and layers take
    0.6 GB in this form and 20 GB as lists.

    Attributes:
        bits: ``[batch | 1, heads | 1, q_blocks, packed_width(kv_blocks)]`` uint8; key block c is
            bit ``c % 8`` (1 << that) of byte ``c // 8``. Bits past the last block are 0.
        longest: At least as many blocks as any row keeps; how wide lists must be. A number on the
            host, so that making lists does not wait for the device.
        head_density: See :meth:`BlockMask.head_density`.
        block: Tokens in a query block and in a key block.
        seq: Tokens of the query and of the key sequence.
    """

    bits: Tensor
    longest: int
    head_density: Tensor
    block: tuple[int, int]
    seq: tuple[int, int]

    @classmethod
    def from_dense(
        cls,
        keep: Tensor,
        block: tuple[int, int] | int,
        seq: tuple[int, int] | int,
        longest: int | None = None,
    ) -> PackedMask:
        """Packs a boolean matrix of blocks.

        Args:
            keep: ``[batch | 1, heads | 1, q_blocks, kv_blocks]`` bool.
            block: Tokens in a (query, key) block; one int for both.
            seq: Tokens of the (query, key) sequence; one int for both.
            longest: Upper bound of the blocks that a row keeps; all of them if None.

        Raises:
            ValueError: As :meth:`BlockMask.from_dense`.
        """
        block, seq = _pairs(block, seq)
        _check_keep(keep, block, seq)
        columns = keep.shape[-1]
        longest = columns if longest is None else max(1, min(longest, columns))
        missing = 8 * packed_width(columns) - columns
        padded = torch.nn.functional.pad(keep, (0, missing)).view(*keep.shape[:3], -1, 8)
        weights = (1 << torch.arange(8, device=keep.device)).to(torch.uint8)
        bits = (padded * weights).sum(-1, dtype=torch.uint8)
        return cls(bits, longest, _density(keep, block, seq), block, seq)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch | 1, heads | 1, q_blocks, kv_blocks)``."""
        batch, heads, rows, _ = self.bits.shape
        return batch, heads, rows, block_count(self.seq[1], self.block[1])

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def nbytes(self) -> int:
        """Bytes that the mask occupies."""
        return sum(t.numel() * t.element_size() for t in (self.bits, self.head_density))

    def dense(self) -> Tensor:
        """The kept blocks as bool ``[batch | 1, heads | 1, q_blocks, kv_blocks]``."""
        places = torch.arange(8, dtype=torch.uint8, device=self.device)
        flags = (self.bits.unsqueeze(-1) >> places) & 1
        return flags.flatten(-2)[..., : self.shape[-1]].bool()

    def lists(self) -> BlockMask:
        """The mask in the form that kernels walk."""
        return BlockMask(*_lists(self.dense(), self.longest), self.block, self.seq, self.bits)

    def density(self) -> float:
        """Mean of ``head_density`` over batch and heads. Reads back from the device."""
        return float(self.head_density.mean())


def packed_width(columns: int) -> int:
    """Bytes of a packed mask row: whole 32-bit words, which kernels read at once."""
    return 4 * -(-columns // 32)


def _pairs(
    block: tuple[int, int] | int, seq: tuple[int, int] | int
) -> tuple[tuple[int, int], tuple[int, int]]:
    return block_sides(block), block_sides(seq)


def _check_keep(keep: Tensor, block: tuple[int, int], seq: tuple[int, int]) -> None:
    expected = (block_count(seq[0], block[0]), block_count(seq[1], block[1]))
    if keep.dtype != torch.bool:
        raise ValueError(f"keep must be a bool tensor, got {keep.dtype}; compare it first")
    if keep.ndim != 4 or tuple(keep.shape[-2:]) != expected:
        raise ValueError(
            f"keep must be [batch, heads, {expected[0]}, {expected[1]}] for {seq} tokens in "
            f"blocks of {block}, got {tuple(keep.shape)}"
        )


def _lists(keep: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices of the kept blocks, int32; the lists are ``longest`` wide."""
    # A stable descending sort of a 0/1 row lists its ones first, in ascending column order.
    order = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return keep.sum(-1, dtype=torch.int32), order[..., :longest].to(torch.int32).contiguous()


def _density(keep: Tensor, block: tuple[int, int], seq: tuple[int, int]) -> Tensor:
    """Kept pairs over all pairs of real tokens, fp32 ``[batch | 1, heads | 1]``."""
    rows = block_sizes(seq[0], block[0], keep.device).double()
    columns = block_sizes(seq[1], block[1], keep.device).double()
    # All key blocks but the last are equal: count the kept ones, then correct for the last.
    last = keep[..., -1].double() * (columns[-1] - columns[0])
    kept = (keep.sum(-1).double() * columns[0] + last) @ rows
    return (kept / (seq[0] * seq[1])).float()
