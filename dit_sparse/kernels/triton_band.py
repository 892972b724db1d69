"""Attention over bands and columns of blocks in Triton, without lists of blocks.

One program computes one tile of queries of one head. Which key blocks it walks follows from four
numbers of its head by arithmetic: there is no list to build, keep or read. The heads of a launch
may differ in these numbers, so all heads of a layer that use one token order share one launch, the
most expensive ones first.

Tokens stay where the model put them. Queries, outputs and the blocks with text are addressed
through the map from a place in the order of the blocks to a token. So are, on the pointer path,
the video's keys and values; on the TMA path, which reads whole boxes, the heads in position-major
order get a copy of these in that order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.bands import BandMask, HeadPattern, TokenOrder
from dit_sparse.kernels.ops import Attended, AttentionCall, BandedCall, Impl
from dit_sparse.kernels.triton_attention import (
    Config,
    Path,
    box_shape,
    choose_path,
    default_config,
)
from dit_sparse.kernels.triton_common import (
    LOG2_E,
    RANK,
    capability,
    ceil_div,
    last_contiguous,
    padded_dim,
    refusals,
)
from dit_sparse.kernels.triton_launch import Boxes, launch_kernel
from dit_sparse.kernels.triton_softmax import online_softmax


@triton.jit
def _token_at(place, video, video_start, frames, area, POSITION_MAJOR: tl.constexpr):
    """The token at ``place`` of the blocks' order: video first, then text."""
    at = place
    if POSITION_MAJOR:
        at = (place % frames) * area + place // frames
    # Text before the video comes first; then text after it, whose place is its token.
    text = tl.where(place < video + video_start, place - video, place)
    return tl.where(place < video, video_start + at, text)


@triton.jit
def _columns_below(block, columns, offset, blocks):
    """How many of the columns ``(i * blocks + offset) // columns`` lie below ``block``."""
    blocks = tl.maximum(blocks, 1)  # without video blocks there are no columns either
    return tl.minimum((tl.maximum(block * columns - offset, 0) + blocks - 1) // blocks, columns)


@triton.jit
def _kept_below(block, low, high, before, after, columns, offset, blocks):
    """How many of the kept video blocks, band ``low..high`` and columns, lie below ``block``."""
    below = _columns_below(block, columns, offset, blocks)
    band = tl.minimum(tl.maximum(block - low, 0), high - low)
    return tl.minimum(below, before) + band + tl.maximum(below - after, 0)


@triton.jit
def _block_at(n, low, high, before, after, count, columns, offset, blocks):
    """The n-th kept block: columns left of the band, band, columns right of it, text."""
    column = tl.where(n < before, n, n - before - (high - low) + after)
    block = (column * blocks + offset) // tl.maximum(columns, 1)
    block = tl.where((n >= before) & (n < before + high - low), low + n - before, block)
    return tl.where(n < count, block, blocks + n - count)


@triton.jit
def _attend_bands(
    acc,
    denom,
    peak,
    q,
    k,
    v,
    key_valid,
    first,
    last,
    low,
    high,
    before,
    after,
    count,
    columns,
    offset,
    blocks,
    tokens,
    video,
    video_start,
    frames,
    area,
    k_stride,
    v_stride,
    k_row,
    k_col,
    v_row,
    v_col,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITION_MAJOR: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds the kept blocks ``first..last`` to the running softmax ``(acc, denom, peak)``."""
    SPLIT: tl.constexpr = BLOCK // TILE_K
    NEG_INF: tl.constexpr = float("-inf")
    steps = tl.arange(0, TILE_K)
    dims = tl.arange(0, DIM_PAD)
    for n in range(first * SPLIT, last * SPLIT):
        block = _block_at(n // SPLIT, low, high, before, after, count, columns, offset, blocks)
        start = block * BLOCK + (n % SPLIT) * TILE_K
        if not TMA:
            if MASKED or POSITION_MAJOR:
                token = _token_at(start + steps, video, video_start, frames, area, POSITION_MAJOR)
            else:
                token = video_start + start + steps
            at = token.to(tl.int64)[:, None]
        if MASKED:
            keep = start + steps < tokens  # [TILE_K]
            if key_valid is not None:
                keep = tl.load(key_valid + token, mask=keep, other=0) != 0
            load_mask = keep[:, None] & (dims < DIM)[None, :]
        else:
            load_mask = (dims < DIM)[None, :]
        # Keys, [TILE_K, DIM_PAD].
        if TMA:
            keys = k.load([k_row + start, k_col])
        elif MASKED or DIM != DIM_PAD:
            keys = tl.load(k + at * k_stride + dims[None, :], mask=load_mask, other=0.0)
        else:
            keys = tl.load(k + at * k_stride + dims[None, :])
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")  # [TILE_Q, TILE_K]
        if MASKED:
            scores = tl.where(keep[None, :], scores, NEG_INF)
        weights, decay, denom, peak = online_softmax(scores, peak, denom, scale_log2, MASKED)
        # Values, [TILE_K, DIM_PAD]; those of masked keys must be 0, since 0 * NaN is NaN.
        if TMA:
            values = v.load([v_row + start, v_col])
        elif MASKED or DIM != DIM_PAD:
            values = tl.load(v + at * v_stride + dims[None, :], mask=load_mask, other=0.0)
        else:
            values = tl.load(v + at * v_stride + dims[None, :])
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, denom, peak


@triton.jit
def _banded_fwd_kernel(
    q,  # [batch, tokens, heads, dim]
    k,  # as q
    v,  # as q
    k_boxes,  # 2-D descriptor of the video's keys with TMA, else None
    v_boxes,
    out,  # as q, contiguous
    lse,  # [batch, heads, tokens] fp32, contiguous
    patterns,  # [heads of this launch, 4] int32: head, half-width (-1: none, -2: skip), columns,
    # offset of the columns
    key_valid,  # [batch, tokens] uint8, or None
    valid_prefix,  # [batch] int32: video tokens before the first invalid one, or None
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    # Of the boxes: first row, rows per batch element and per head, columns per head.
    k_first,
    k_batch_rows,
    k_head_rows,
    k_head_columns,
    v_first,
    v_batch_rows,
    v_head_rows,
    v_head_columns,
    group,
    heads,
    tokens,
    video,
    video_start,
    frames,
    area,
    video_blocks,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITION_MAJOR: tl.constexpr,
    NEEDS_MASK: tl.constexpr,
    TMA: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    # Rows of text, which keep everything, come first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    member = tl.program_id(1) % group
    batch = tl.program_id(1) // group
    head = tl.load(patterns + member * 4)
    half = tl.load(patterns + member * 4 + 1)
    columns = tl.load(patterns + member * 4 + 2)
    offset = tl.load(patterns + member * 4 + 3)
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)

    places = tile * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_PAD)
    live = places < tokens
    at_q = live[:, None] & (dims < DIM)[None, :]
    rows = _token_at(places, video, video_start, frames, area, POSITION_MAJOR).to(tl.int64)
    q += batch64 * q_batch + head64 * q_head
    queries = tl.load(q + rows[:, None] * q_token + dims[None, :], mask=at_q, other=0)

    row = (tile * TILE_Q) // BLOCK
    is_text = row >= video_blocks
    low = tl.where(is_text, 0, tl.maximum(row - half, 0))
    high = tl.where(is_text, video_blocks, tl.minimum(row + half + 1, video_blocks))
    columns = tl.where(is_text, 0, columns)
    no_band = (half < 0) & (is_text == 0)
    low = tl.where(no_band, 0, low)
    high = tl.where(no_band, 0, high)
    before = _columns_below(low, columns, offset, video_blocks)
    after = _columns_below(high, columns, offset, video_blocks)
    count = before + (high - low) + columns - after
    # Blocks that need no masking come first: the kept ones ascend, text follows the video.
    inside = tl.minimum(video // BLOCK, video_blocks)
    if valid_prefix is not None:
        inside = tl.minimum(tl.load(valid_prefix + batch) // BLOCK, video_blocks)
        key_valid += batch64 * tokens
    unmasked = _kept_below(inside, low, high, before, after, columns, offset, video_blocks)
    total = count + tl.cdiv(tokens, BLOCK) - video_blocks
    unmasked = tl.where(half == -2, 0, unmasked)
    total = tl.where(half == -2, 0, total)

    k += batch64 * k_batch + head64 * k_head
    v += batch64 * v_batch + head64 * v_head
    # 64-bit, so that token * stride cannot overflow.
    k_stride = tl.cast(k_token, tl.int64)
    v_stride = tl.cast(v_token, tl.int64)
    k_main = k
    v_main = v
    k_row = 0
    k_col = 0
    v_row = 0
    v_col = 0
    if TMA:
        box = head
        # A copy holds the heads of this launch only.
        if POSITION_MAJOR:
            box = member
        k_main = k_boxes
        v_main = v_boxes
        k_row = k_first + batch * k_batch_rows + box * k_head_rows
        k_col = box * k_head_columns
        v_row = v_first + batch * v_batch_rows + box * v_head_rows
        v_col = box * v_head_columns

    acc = tl.zeros([TILE_Q, DIM_PAD], dtype=tl.float32)
    denom = tl.zeros([TILE_Q], dtype=tl.float32)
    peak = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    acc, denom, peak = _attend_bands(
        acc, denom, peak, queries, k_main, v_main, key_valid, 0, unmasked,
        low, high, before, after, count, columns, offset, video_blocks,
        tokens, video, video_start, frames, area, k_stride, v_stride,
        k_row, k_col, v_row, v_col, scale_log2,
        DIM, DIM_PAD, TILE_K, BLOCK, POSITION_MAJOR, False, TMA,
    )  # fmt: skip
    if NEEDS_MASK:
        acc, denom, peak = _attend_bands(
            acc, denom, peak, queries, k, v, key_valid, unmasked, total,
            low, high, before, after, count, columns, offset, video_blocks,
            tokens, video, video_start, frames, area, k_stride, v_stride,
            0, 0, 0, 0, scale_log2,
            DIM, DIM_PAD, TILE_K, BLOCK, POSITION_MAJOR, True, False,
        )  # fmt: skip

    empty = denom == 0.0
    denom = tl.where(empty, 1.0, denom)
    natural = tl.where(empty, float("-inf"), (peak + tl.log2(denom)) * LN_2)
    tl.store(lse + (batch64 * heads + head) * tokens + rows, natural, mask=live)
    result = (acc / denom[:, None]).to(out.dtype.element_ty)
    out_rows = ((batch64 * tokens + rows) * heads + head) * DIM
    tl.store(out + out_rows[:, None] + dims[None, :], result, mask=at_q)


class _Boxes(NamedTuple):
    """What TMA reads of a tensor, and where a head's video begins in it."""

    boxes: Boxes | None
    first_row: int
    batch_rows: int
    head_rows: int
    head_columns: int

    @classmethod
    def over(cls, tensor: Tensor, tile: int, first_row: int) -> _Boxes:
        shape, (batch_rows, _, head_rows, head_columns) = box_shape(tensor, tile)
        return cls(Boxes(tensor, shape), first_row, batch_rows, head_rows, head_columns)


def _position_major(x: Tensor, bands: BandMask, heads: Tensor) -> Tensor:
    """The video of n ``heads``, the frames of a place side by side: ``[batch, video, n, dim]``."""
    start, video, frames = bands.layout.video_start, bands.layout.video, bands.layout.grid[0]
    by_place = x[:, start : start + video].unflatten(1, (frames, -1)).transpose(1, 2)
    return by_place.index_select(3, heads).flatten(1, 2)


def _prefix(key_valid: Tensor, bands: BandMask, order: TokenOrder) -> Tensor:
    """Video tokens before the first invalid one in ``order``, ``[batch]`` int32."""
    layout = bands.layout
    flags = key_valid[:, layout.video_start : layout.video_start + layout.video]
    if order == "position_major":
        flags = flags.unflatten(1, (layout.grid[0], -1)).transpose(1, 2).flatten(1)
    return flags.int().cumprod(-1).sum(-1, dtype=torch.int32)


def _weight(pattern: HeadPattern, blocks: int) -> int:
    width = 0 if pattern.half_width is None else 2 * pattern.half_width + 1
    return min(width + pattern.columns, blocks)


@lru_cache(maxsize=4096)
def _table(
    bands: BandMask, order: TokenOrder, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """What the kernel reads of the heads in ``order``, most expensive first, and these heads.

    Skipped heads, which only need zeros, go with the frame-major ones.
    """
    blocks = bands.video_blocks
    numbers = [
        head
        for head, pattern in enumerate(bands.heads)
        if ("frame_major" if pattern.skip else pattern.order) == order
    ]
    if not numbers:
        return None
    numbers.sort(key=lambda head: -_weight(bands.heads[head], blocks))
    rows = []
    for head in numbers:
        pattern = bands.heads[head]
        half = -1 if pattern.half_width is None else pattern.half_width
        rows.append([head, -2 if pattern.skip else half, *pattern.spacing(blocks)])
    return (
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(numbers, device=device),
    )


def launch(call: BandedCall, path: Path = "pointer", config: Config | None = None) -> Attended:
    """Runs the kernel, once for each token order among the heads.

    Args:
        call: What to compute.
        path: How keys and values of the video are read; ``"tma"`` requires that
            :func:`choose_path` of the same operands gives it.
        config: Launch parameters; by default those of block-sparse attention.

    Returns:
        ``out [batch, tokens, heads, dim]`` and ``lse [batch, heads, tokens]`` fp32.
    """
    q, k, v = (last_contiguous(x) for x in (call.q, call.k, call.v))
    bands, layout = call.bands, call.bands.layout
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return Attended(out, lse)
    config = config or _config(call, path)
    tile_q, tile_k = min(config.tile_q, bands.block), min(config.tile_k, bands.block)
    flags = None if call.key_valid is None else call.key_valid.contiguous().view(torch.uint8)
    orders: tuple[TokenOrder, ...] = ("frame_major", "position_major")
    for order in orders:
        found = _table(bands, order, q.device)
        if found is None:
            continue
        table, members = found
        prefix = None if call.key_valid is None else _prefix(call.key_valid, bands, order)
        k_boxes = v_boxes = _Boxes(None, 0, 0, 0, 0)
        if path == "tma":
            copied = order == "position_major"
            sources = [_position_major(x, bands, members) if copied else x for x in (k, v)]
            first = 0 if copied else layout.video_start
            k_boxes, v_boxes = (_Boxes.over(x, tile_k, first) for x in sources)
        launch_kernel(
            _banded_fwd_kernel, (ceil_div(tokens, tile_q), batch * len(members)),
            (q, k, v, k_boxes.boxes, v_boxes.boxes, out, lse, table, flags, prefix),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_boxes[1:], *v_boxes[1:],
             len(members), heads, tokens, layout.video, layout.video_start,
             layout.grid[0], layout.grid[1] * layout.grid[2], bands.video_blocks,
             call.scale * LOG2_E),
            DIM=dim, DIM_PAD=padded_dim(dim), TILE_Q=tile_q, TILE_K=tile_k, BLOCK=bands.block,
            POSITION_MAJOR=order == "position_major",
            NEEDS_MASK=flags is not None or tokens > bands.video_blocks * bands.block
            or tokens % bands.block != 0,
            TMA=path == "tma",
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return Attended(out, lse)


def _config(call: BandedCall, path: Path) -> Config:
    config = default_config(_plain(call), path)
    if capability(call.q)[0] != 9 and call.q.dtype != torch.float32:
        # Addresses by place take registers that wider tiles would spill in the loops.
        widest = 32 if padded_dim(call.q.shape[-1]) >= 128 else 64
        return config._replace(tile_k=min(config.tile_k, widest))
    return config


def _plain(call: BandedCall) -> AttentionCall:
    """The dense call of the same operands, by which paths and launch parameters are chosen."""
    return AttentionCall(call.q, call.k, call.v, None, call.key_valid, call.scale)


class TritonBanded(Impl):
    op, name, rank = "banded_attention", "triton", RANK

    def reasons(self, call: BandedCall) -> list[str]:
        reasons = refusals(call.q, (call.bands.block, call.bands.block))
        if call.scale <= 0:
            reasons.append(f"scale must be positive, got {call.scale}")
        return reasons

    def __call__(self, call: BandedCall) -> Attended:
        return launch(call, choose_path(_plain(call)))
