"""Calls of every Triton kernel, as they occur in models, for :mod:`benchmarks.check_compile`.

Operands are small and on the CPU: only shapes, dtypes and alignment decide what is compiled. Head
counts and lengths are neither 1 nor, where a case is padded, multiples of 16, for which triton
makes kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.bands import BandMask, HeadPattern
from dit_sparse.kernels import (
    ops,
    triton_attention,
    triton_band,
    triton_block_mass,
    triton_fp8,
    triton_mask,
    triton_merge,
    triton_neighborhood,
    triton_reorder,
    triton_residual,
    triton_summary,
)
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.layout import TokenLayout
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.neighborhood import Neighborhood
from dit_sparse.neighborhood_mask import arrange

DIMS = (40, 64, 96, 128, 256)
BLOCKS = ((64, 64), (128, 64), (128, 128))
BATCH, HEADS = 2, 12
EVEN, RAGGED = 512, 500

Block = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: What is called: operation, dtype, head dim, block and variant.
        launch: Makes the call, unless the kernel refuses it there.
        dim: Head dimension; 0 where there is none.
    """

    name: str
    launch: Callable[[], object]
    dim: int = 0


def _tensor(tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(BATCH, tokens, HEADS, dim, dtype=dtype)


def _valid(tokens: int) -> Tensor:
    return torch.ones(BATCH, tokens, dtype=torch.bool)


def _mask(tokens: int, block: Block) -> PackedMask:
    rows, columns = (block_count(tokens, side) for side in block)
    keep = torch.ones(BATCH, HEADS, rows, columns, dtype=torch.bool)
    return PackedMask.from_dense(keep, block, (tokens, tokens))


def _summary(tokens: int, dim: int, block: int, dtype: torch.dtype) -> BlockSummary:
    columns = block_count(tokens, block)
    mean = torch.zeros(BATCH, columns, HEADS, dim, dtype=dtype)
    slope = torch.zeros(BATCH, HEADS, dim, dim)
    return BlockSummary(mean, mean, torch.ones(BATCH, columns), slope)


def _attention(dim: int, dtype: torch.dtype, block: Block | None, variant: str) -> None:
    tokens = EVEN if variant == "plain" else RAGGED
    x = _tensor(tokens, dim, dtype)
    mask = None if block is None else _mask(tokens, block)
    summary = None
    if block is not None and variant == "summary":
        summary = _summary(tokens, dim, block[1], dtype)
    valid = _valid(tokens) if variant in ("padded", "summary") else None
    call = ops.AttentionCall(x, x, x, mask, valid, 0.1, summary)
    if not triton_attention.slope_reasons(call):
        triton_attention.TritonAttention()(call)


def _attention_fp8(
    dim: int, dtype: torch.dtype, block: Block | None, precision: str, variant: str
) -> None:
    tokens = EVEN if variant == "plain" else RAGGED
    x = _tensor(tokens, dim, dtype)
    mask = None if block is None else _mask(tokens, block)
    valid = _valid(tokens) if variant == "padded" else None
    call = ops.AttentionCall(x, x, x, mask, valid, 0.1, precision=precision)
    if not triton_fp8.capability_reasons(call):
        triton_fp8.TritonFp8()(call)


def _row_lse(dim: int, dtype: torch.dtype, block: Block | None) -> None:
    x = _tensor(RAGGED, dim, dtype)
    mask = None if block is None else _mask(RAGGED, block)
    call = ops.AttentionCall(x, x, None, mask, _valid(RAGGED), 0.1)
    triton_attention.TritonRowLse()(call)


def _block_mass(dim: int, dtype: torch.dtype, block: Block, variant: str) -> None:
    tokens = EVEN if variant == "plain" else RAGGED
    x, lse = _tensor(tokens, dim, dtype), torch.zeros(BATCH, HEADS, tokens)
    valid = None if variant == "plain" else _valid(tokens)
    triton_block_mass.TritonBlockMass()(ops.BlockMassCall(x, x, lse, block, valid, 0.1))


def _summarize(dim: int, dtype: torch.dtype, block: int, first_order: bool) -> None:
    x = _tensor(RAGGED, dim, dtype)
    call = ops.SummarizeCall(x, x, block, block_count(RAGGED, block), first_order, _valid(RAGGED))
    triton_summary.TritonSummarize()(call)


def _top_blocks(columns: int) -> None:
    mass = torch.zeros(1, 2, 3, columns)
    seq = (3 * 128, columns * 128)
    count = torch.ones(1, 2, dtype=torch.int32)
    free = (3, columns - 2)
    call = ops.TopBlocksCall(mass, count, (128, 128), seq, free, columns)
    triton_mask.TritonTopBlocks()(call)


def _neighborhood(dim: int, dtype: torch.dtype, block: int, axes: int) -> None:
    grid = (4, 10, 12)
    window = [3 if axis < axes else -1 for axis in range(3)]
    layout = TokenLayout(grid, 23)
    neighborhood = Neighborhood.on(grid, window=tuple(window))
    mask = arrange(layout, neighborhood, (2, 5, 4), block, torch.device("cpu")).mask
    assert mask.partial is not None
    x = _tensor(layout.tokens, dim, dtype)
    call = ops.NeighborhoodCall(x, x, x, mask, mask.partial, None, _valid(layout.tokens), 0.1)
    triton_neighborhood.TritonNeighborhood()(call)


def _bands(dim: int, dtype: torch.dtype, block: int, padded: bool) -> None:
    # Both orders of tokens, hence both kernels.
    patterns = (HeadPattern(1), HeadPattern(0, columns=2, order="position_major"))
    layout = TokenLayout((4, 10, 12), 23) if padded else TokenLayout((4, 8, 16))
    bands = BandMask(patterns * (HEADS // 2), block, layout)
    x = _tensor(layout.tokens, dim, dtype)
    valid = _valid(layout.tokens) if padded else None
    triton_band.TritonBanded()(ops.BandedCall(x, x, x, bands, valid, 0.1))


def _residual(dim: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    sparse = _tensor(RAGGED, dim, dtype)
    values = torch.zeros(sparse.shape).to(stored)
    scale = torch.ones(*sparse.shape[:-1], 1) if stored == torch.float8_e4m3fn else None
    factor = torch.ones(BATCH, RAGGED, HEADS, 1, dtype=dtype)
    triton_residual.add(sparse, values, scale, factor, factor, torch.arange(RAGGED))
    index = (slice(None), slice(0, 100), slice(None))
    part = sparse[:, :100].contiguous()
    triton_residual.replace(values, scale, index, part, sparse, factor[:, :100])


def _merge(dim: int, dtype: torch.dtype) -> None:
    attended = ops.Attended(_tensor(RAGGED, dim, dtype), torch.zeros(BATCH, HEADS, RAGGED))
    triton_merge.merge_into(attended, attended)


def _reorder(dim: int, dtype: torch.dtype) -> None:
    x = _tensor(RAGGED, dim, dtype)
    triton_reorder.TritonReorder()(ops.ReorderCall(torch.arange(RAGGED), (x, x, x)))


def cases() -> Iterator[Case]:
    """All calls."""

    def case(op: str, launch: Callable[..., None], dim: int, dtype: torch.dtype, *rest) -> Case:
        words = [op, str(dtype).removeprefix("torch."), str(dim)]
        words += ["x".join(map(str, r)) if isinstance(r, tuple) else str(r) for r in rest]
        return Case(" ".join(words), lambda: launch(dim, dtype, *rest), dim)

    half, single, eight = torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for dim in DIMS:
        for variant in ("plain", "ragged", "padded"):
            yield case("attention", _attention, dim, half, None, variant)
        for precision in ops.FP8 if dim <= 128 else ():
            yield case("attention_fp8", _attention_fp8, dim, half, None, precision, "padded")
        for block in BLOCKS:
            for variant in ("plain", "ragged", "padded", "summary"):
                yield case("attention", _attention, dim, half, block, variant)
            for variant in ("padded", "summary"):
                yield case("attention", _attention, dim, single, block, variant)
            for precision in ops.FP8 if dim <= 128 else ():
                for variant in ("plain", "padded"):
                    yield case(
                        "attention_fp8", _attention_fp8, dim, half, block, precision, variant
                    )
            yield case("block_mass", _block_mass, dim, half, block, "plain")
            for dtype in (half, single):
                yield case("block_mass", _block_mass, dim, dtype, block, "padded")
                yield case("row_lse", _row_lse, dim, dtype, block)
        # Some of the queries of blocks of 64 and 128.
        for block in ((16, 64), (32, 64), (32, 128)):
            for dtype, variant in ((half, "plain"), (half, "padded"), (single, "padded")):
                yield case("block_mass", _block_mass, dim, dtype, block, variant)
        for dtype in (half, single):
            yield case("row_lse", _row_lse, dim, dtype, None)
            yield case("merge", _merge, dim, dtype)
            yield case("reorder", _reorder, dim, dtype)
            for block in (64, 128):
                yield case("summarize", _summarize, dim, dtype, block, False)
                yield case("bands", _bands, dim, dtype, block, True)
                for axes in (1, 3):
                    yield case("neighborhood", _neighborhood, dim, dtype, block, axes)
            for stored in (dtype, eight):
                yield case("residual", _residual, dim, dtype, stored)
        for block in (64, 128):
            yield case("bands", _bands, dim, half, block, False)
            # In fp32 the compiler takes minutes.
            yield case("summarize", _summarize, dim, half, block, True)
    for dim in (64, 128):
        for variant in ("padded", "summary"):
            yield case("attention", _attention, dim, torch.float16, (128, 128), variant)
    for columns in (100, 4096, 16384):
        yield Case(f"top_blocks {columns}", lambda columns=columns: _top_blocks(columns))
