"""Lists of kept blocks from packed masks, and packed masks from block mass, in Triton."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.ops import Impl, TopBlocks, TopBlocksCall
from dit_sparse.kernels.triton_common import INTERPRETED, RANK, power_of_two
from dit_sparse.kernels.triton_launch import Launch, launch_kernel
from dit_sparse.mask import BlockMask, PackedMask, packed_width

# A program holds one row of block mass in registers.
_MAX_COLUMNS = 16384


@triton.jit
def _lists_kernel(
    bits,  # [rows, packed_width(columns)] uint8
    counts,  # [rows] int32
    indices,  # [rows, width] int32
    counter,  # [1] int32 that is set to 0, or None
    columns,
    width,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if counter is not None:
        # For the kernel that walks the lists; by itself it would be a launch more.
        tl.store(counter, 0, mask=row == 0)
    bits += row * 4 * tl.cdiv(columns, 32)
    indices += row * width
    found = 0
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        byte = tl.load(bits + column // 8, mask=column < columns, other=0).to(tl.int32)
        kept = (byte >> (column % 8)) & 1
        place = found + tl.cumsum(kept, 0) - 1
        tl.store(indices + place, column, mask=(kept != 0) & (place < width))
        found += tl.sum(kept, 0)
    tl.store(counts + row, tl.minimum(found, width))


def expand(mask: BlockMask | PackedMask) -> BlockMask:
    """The lists of ``mask``, made on its device without waiting for it."""
    if isinstance(mask, BlockMask) or not _is_here(mask):
        return mask.lists()
    return BlockMask(*lists_of(mask), mask.block, mask.seq, mask.bits.contiguous())


def lists_of(mask: BlockMask | PackedMask, counter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Counts and indices of the kept blocks, as in :class:`BlockMask` and contiguous.

    Args:
        mask: Of which device does not matter where it has lists.
        counter: ``[1]`` int32, set to 0.
    """
    if isinstance(mask, BlockMask) or not _is_here(mask):
        if counter is not None:
            counter.zero_()
        lists = mask.lists()
        return lists.kv_num_blocks.contiguous(), lists.kv_indices.contiguous()
    bits = mask.bits.contiguous()
    shape = bits.shape[:3]
    counts = bits.new_empty(shape, dtype=torch.int32)
    indices = bits.new_empty((*shape, mask.longest), dtype=torch.int32)
    rows = counts.numel()
    if rows:
        launch = _lists_launch(mask.shape[3], mask.longest)
        launch((rows,), (bits, counts, indices, counter))
    return counts, indices


def _is_here(mask: PackedMask) -> bool:
    """Whether the kernel can make the lists of ``mask``."""
    return mask.bits.is_cuda or INTERPRETED


@lru_cache(maxsize=256)
def _lists_launch(columns: int, width: int) -> Launch:
    return Launch(_lists_kernel, (columns, width), CHUNK=1024, num_warps=4)


def words_of(mask: BlockMask | PackedMask) -> Tensor:
    """The packed pattern in words of 32 bits, ``[batch | 1, heads | 1, q_blocks, words]`` int32."""
    bits = mask.bits if isinstance(mask, PackedMask) else mask.packed_bits()
    return bits.contiguous().view(torch.int32)


class ListSteps(NamedTuple):
    """How kernels find a list.

    Attributes:
        batch: Mask rows from one batch element to the next; 0 where all share them.
        head: Mask rows from one head to the next; 0 where all share them.
        width: Entries of a list.
    """

    batch: int
    head: int
    width: int


def list_steps(mask: BlockMask | PackedMask) -> ListSteps:
    """The steps between the lists that :func:`lists_of` gives."""
    batch, heads, rows, _ = mask.shape
    width = mask.longest if isinstance(mask, PackedMask) else mask.kv_indices.shape[-1]
    return ListSteps(heads * rows if batch > 1 else 0, rows if heads > 1 else 0, width)


@triton.jit
def _top_blocks_kernel(
    mass,  # [rows of all heads, columns] fp32, contiguous
    budget,  # [heads] int32
    bits,  # [rows of all heads, packed_width(columns)] uint8
    kept_mass,  # [rows of all heads] fp32: of the free columns
    kept_keys,  # [rows of all heads] fp32
    rows,
    columns,
    free_rows,  # rows and columns below these compete; the others are kept
    free_columns,
    block,
    last,  # keys in the last block
    SIZE: tl.constexpr,  # power of two that holds the columns
):
    line = tl.program_id(0).to(tl.int64)
    row = (line % rows).to(tl.int32)
    keep_count = tl.load(budget + line // rows)
    column = tl.arange(0, SIZE)
    competes = (column < free_columns) & (row < free_rows)
    value = tl.load(mass + line * columns + column, mask=column < columns, other=0.0)
    # Mass is not negative, so the order of the numbers is that of their bit patterns.
    key = tl.where(competes, value.to(tl.int32, bitcast=True), -1)
    # The largest threshold that at least keep_count entries reach, one bit at a time.
    threshold = 0
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        reached = tl.sum((key >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= keep_count, trial, threshold)
    above = key > threshold
    equal = key == threshold
    spare = keep_count - tl.sum(above.to(tl.int32), 0)
    # Of equal entries the first ones are kept, so that the choice is deterministic.
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    tl.store(kept_mass + line, tl.sum(tl.where(chosen & competes, value, 0.0), 0))
    kept = (chosen & competes) | (
        (column < columns) & ((column >= free_columns) | (row >= free_rows))
    )
    keys = tl.where(column == columns - 1, last, block)
    tl.store(kept_keys + line, tl.sum(tl.where(kept, keys, 0).to(tl.float32), 0))
    places = tl.reshape(kept.to(tl.int32) << (column % 8), [SIZE // 8, 8])
    packed = tl.sum(places, 1)
    width = 4 * tl.cdiv(columns, 32)
    byte = tl.arange(0, SIZE // 8)
    tl.store(bits + line * width + byte, packed.to(tl.uint8), mask=byte < width)


class TritonTopBlocks(Impl):
    op, name, rank = "top_blocks", "triton", RANK

    def reasons(self, call: TopBlocksCall) -> list[str]:
        reasons = []
        if not (call.mass.is_cuda or INTERPRETED):
            reasons.append(f"needs a CUDA device (or TRITON_INTERPRET=1), got {call.mass.device}")
        if call.mass.dtype != torch.float32:
            reasons.append(f"mass must be float32, got {call.mass.dtype}")
        if call.mass.shape[-1] > _MAX_COLUMNS:
            reasons.append(f"at most {_MAX_COLUMNS} key blocks, got {call.mass.shape[-1]}")
        return reasons

    def __call__(self, call: TopBlocksCall) -> TopBlocks:
        mass = call.mass.contiguous()
        batch, heads, rows, columns = mass.shape
        bits = mass.new_empty((batch, heads, rows, packed_width(columns)), dtype=torch.uint8)
        kept_mass = mass.new_empty((batch, heads, rows))
        kept_keys = torch.empty_like(kept_mass)
        budget = call.count.to(torch.int32).expand(batch, heads).contiguous()
        size = max(32, power_of_two(columns))
        if kept_mass.numel():
            launch_kernel(
                _top_blocks_kernel, (batch * heads * rows,),
                (mass, budget, bits, kept_mass, kept_keys),
                (rows, columns, *call.free, call.block[1],
                 call.seq[1] - (columns - 1) * call.block[1]),
                SIZE=size, num_warps=4 if size <= 4096 else 8,
            )  # fmt: skip
        return TopBlocks(call.packed(bits, kept_keys), kept_mass)
