"""Block-sparse flash attention forward and its log-sum-exp, in Triton.

One program computes one tile of queries of one head. It walks the list of key blocks of its mask
row with an online softmax in base 2. Blocks that lie wholly inside the valid prefix of the keys
are read without any masking; the others (the ragged last block, padding) in a second loop.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.ops import Attended, AttentionCall, Impl, compute_capability
from dit_sparse.kernels.triton_common import (
    INTERPRETED,
    LOG2_E,
    RANK,
    as_float,
    capability,
    ceil_div,
    gluon_module,
    gluon_reasons,
    last_contiguous,
    padded_dim,
    refusals,
)
from dit_sparse.kernels.triton_launch import Boxes, BoxShape, Launch
from dit_sparse.kernels.triton_mask import list_steps, lists_of, words_of
from dit_sparse.kernels.triton_padding import validity
from dit_sparse.kernels.triton_softmax import listed_counts, online_softmax
from dit_sparse.kernels.triton_summary import add_summaries

Path = Literal["pointer", "tma", "hopper"]
# Whether calls that can go through TMA descriptors do; see `benchmarks.kernels` for both paths.
PREFER_TMA = True


class Config(NamedTuple):
    """Launch parameters; the tiles divide the mask's blocks.

    Attributes:
        tile_q: Queries per program.
        tile_k: Keys per loop iteration.
        warps: Warps per program.
        stages: Depth of the software pipeline of loads.
    """

    tile_q: int
    tile_k: int
    warps: int
    stages: int


@triton.jit
def _attend_blocks(
    acc,
    denom,
    peak,
    q,
    k,
    v,
    indices,
    key_valid,
    first,
    last,
    kv_len,
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
    BLOCK_K: tl.constexpr,
    LISTED: tl.constexpr,
    MASKED: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds the listed blocks ``first..last`` to the running softmax ``(acc, denom, peak)``."""
    SPLIT: tl.constexpr = BLOCK_K // TILE_K
    NEG_INF: tl.constexpr = float("-inf")
    tokens = tl.arange(0, TILE_K)
    dims = tl.arange(0, DIM_PAD)
    for n in range(first * SPLIT, last * SPLIT):
        block = n // SPLIT
        if LISTED:
            block = tl.load(indices + block)
        start = block * BLOCK_K + (n % SPLIT) * TILE_K
        if MASKED:
            keep = start + tokens < kv_len  # [TILE_K]
            if key_valid is not None:
                keep = tl.load(key_valid + start + tokens, mask=keep, other=0) != 0
            load_mask = keep[:, None] & (dims < DIM)[None, :]
        else:
            load_mask = (dims < DIM)[None, :]
        # Keys, [TILE_K, DIM_PAD].
        if TMA:
            keys = k.load([k_row + start, k_col])
        else:
            k_at = k + start * k_stride + (tokens[:, None] * k_stride + dims[None, :])
            if MASKED or DIM != DIM_PAD:
                keys = tl.load(k_at, mask=load_mask, other=0.0)
            else:
                keys = tl.load(k_at)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")  # [TILE_Q, TILE_K]
        if MASKED:
            scores = tl.where(keep[None, :], scores, NEG_INF)
        weights, decay, denom, peak = online_softmax(scores, peak, denom, scale_log2, MASKED)
        if WITH_VALUES:
            # Values, [TILE_K, DIM_PAD]; those of masked keys must be 0, since 0 * NaN is NaN.
            if TMA:
                values = v.load([v_row + start, v_col])
                if MASKED:
                    values = tl.where(keep[:, None], values, 0.0).to(values.dtype)
            else:
                v_at = v + start * v_stride + (tokens[:, None] * v_stride + dims[None, :])
                if MASKED or DIM != DIM_PAD:
                    values = tl.load(v_at, mask=load_mask, other=0.0)
                else:
                    values = tl.load(v_at)
            acc = acc * decay[:, None]
            acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, denom, peak


@triton.jit
def _attention_fwd_kernel(
    q,  # [batch, q_len, heads, dim]
    k,  # [batch, kv_len, heads, dim]; a 2-D descriptor with TMA
    v,  # as k; None without WITH_VALUES
    out,  # [batch, q_len, heads, dim], contiguous; None without WITH_VALUES
    lse,  # [batch, heads, q_len] fp32, contiguous
    counts,  # [batch | 1, heads | 1, mask rows] int32, or None
    indices,  # [batch | 1, heads | 1, mask rows, list_len] int32, or None
    key_valid,  # [batch, kv_len] uint8, or None
    valid_prefix,  # [batch] int32, or None
    key_mean,  # [batch, heads, kv_blocks, dim], contiguous; None without a summary
    value_mean,  # as key_mean
    key_count,  # [batch, kv_blocks] fp32
    slope,  # [batch, heads, dim, dim] as q, contiguous, or None
    bits,  # [batch | 1, heads | 1, mask rows, ceil(kv_blocks / 32)] int32
    kept_lse,  # as lse
    q_batch,
    q_token,
    q_head,
    # Element strides of k and v; with TMA: rows per batch element, (unused), rows per head, and
    # columns per head in `k_column` and `v_column`.
    k_batch,
    k_token,
    k_head,
    k_column,
    v_batch,
    v_token,
    v_head,
    v_column,
    mask_batch,
    mask_head,
    list_len,
    heads,
    q_len,
    kv_len,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEEDS_MASK: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    TMA: tl.constexpr,
):
    LISTED: tl.constexpr = indices is not None
    LN_2: tl.constexpr = 0.6931471805599453
    # On Hopper, where operands lie in shared memory, wide tiles of means and a pipeline of their
    # loads would need more registers than all else, and half as many programs would share a
    # processor. Without TMA the main loop needs as many anyway.
    TILE_C: tl.constexpr = min(TILE_K, 32) if TMA else TILE_K
    tile = tl.program_id(0)
    head = tl.program_id(1) % heads
    batch = tl.program_id(1) // heads
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)

    rows = tile * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_PAD)
    live = rows < q_len
    at_q = live[:, None] & (dims < DIM)[None, :]
    q += batch64 * q_batch + head64 * q_head
    queries = tl.load(q + rows.to(tl.int64)[:, None] * q_token + dims[None, :], mask=at_q, other=0)

    inside = kv_len // BLOCK_K
    if valid_prefix is not None:
        inside = tl.load(valid_prefix + batch) // BLOCK_K
    mask_row = batch64 * mask_batch + head64 * mask_head + (tile * TILE_Q) // BLOCK_Q
    if LISTED:
        indices += mask_row * list_len
    count, unmasked = listed_counts(
        counts, indices, mask_row, inside, LISTED, NEEDS_MASK, tl.cdiv(kv_len, BLOCK_K)
    )

    if key_valid is not None:
        key_valid += batch64 * kv_len
    if TMA:
        k_row = batch * k_batch + head * k_head
        k_col = head * k_column
        v_row = batch * v_batch + head * v_head
        v_col = head * v_column
    else:
        k += batch64 * k_batch + head64 * k_head
        if WITH_VALUES:
            v += batch64 * v_batch + head64 * v_head
        k_row = 0
        k_col = 0
        v_row = 0
        v_col = 0
    # 64-bit, so that token * stride cannot overflow.
    k_stride = tl.cast(k_token, tl.int64)
    v_stride = tl.cast(v_token, tl.int64)

    acc = tl.zeros([TILE_Q, DIM_PAD], dtype=tl.float32)  # unused, hence removed, without values
    denom = tl.zeros([TILE_Q], dtype=tl.float32)
    peak = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    acc, denom, peak = _attend_blocks(
        acc, denom, peak, queries, k, v, indices, key_valid, 0, unmasked, kv_len,
        k_stride, v_stride, k_row, k_col, v_row, v_col, scale_log2,
        DIM, DIM_PAD, TILE_K, BLOCK_K, LISTED, False, WITH_VALUES, TMA,
    )  # fmt: skip
    if NEEDS_MASK:
        acc, denom, peak = _attend_blocks(
            acc, denom, peak, queries, k, v, indices, key_valid, unmasked, count, kv_len,
            k_stride, v_stride, k_row, k_col, v_row, v_col, scale_log2,
            DIM, DIM_PAD, TILE_K, BLOCK_K, LISTED, True, WITH_VALUES, TMA,
        )  # fmt: skip

    lse_rows = (batch64 * heads + head) * q_len + rows
    if key_mean is not None:
        kept = tl.where(denom == 0.0, float("-inf"), (peak + tl.log2(denom)) * LN_2)
        tl.store(kept_lse + lse_rows, kept, mask=live)
        columns = tl.cdiv(kv_len, BLOCK_K)
        first = (batch64 * heads + head) * columns * DIM
        matrix = None
        if slope is not None:
            matrix = slope + (batch64 * heads + head) * DIM * DIM
        acc, denom, peak = add_summaries(
            acc, denom, peak, queries, key_mean + first, value_mean + first,
            key_count + batch64 * columns, bits + mask_row * tl.cdiv(columns, 32), matrix,
            columns, DIM, scale, scale_log2, DIM, DIM_PAD, TILE_C, TMA,
        )  # fmt: skip
    empty = denom == 0.0
    denom = tl.where(empty, 1.0, denom)
    natural = tl.where(empty, float("-inf"), (peak + tl.log2(denom)) * LN_2)
    tl.store(lse + lse_rows, natural, mask=live)
    if WITH_VALUES:
        result = (acc / denom[:, None]).to(out.dtype.element_ty)
        out_rows = ((batch64 * q_len + rows) * heads + head) * DIM
        tl.store(out + out_rows[:, None] + dims[None, :], result, mask=at_q)


def default_config(call: AttentionCall, path: Path) -> Config:
    """Launch parameters for ``call``, before they are cut to the mask's blocks.

    Fixed rather than tuned at the first call, which would stall a user's first step. Those for
    Hopper were measured; others were chosen by what compiles without spilling in a loop, see
    `benchmarks.check_compile`.
    """
    dim = padded_dim(call.q.shape[-1])
    if call.q.dtype == torch.float32:
        # "ieee" products run on the FMA units with operands in registers. The largest tiles that
        # the compiler for sm_90 and sm_86 places without spilling.
        return Config(16, 16, 8, 1) if dim == 256 else Config(32, 32, 8, 1)
    if dim == 256:
        # 68 KiB of shared memory fit the 99 KiB of consumer cards; 4 warps spill, 8 do not.
        return Config(64, 32, 8, 2)
    major, _ = capability(call.q)
    # Loads of part of a tile's columns take registers for their masks.
    partial = major != 9 and call.q.shape[-1] != dim
    if dim == 128:
        if major == 9 and path == "tma":
            # Measured on H100: reaches 71-81 % of ideal.
            return Config(128, 64, 4, 2)
        # Without products of whole warp groups operands take registers too: 4 warps spill in the
        # loops. On consumer Blackwell so do 8, unless tiles are narrower.
        # Summaries do that to tiles of 64 queries on Ampere.
        query_block = 0 if call.mask is None else call.mask.block[0]
        small = major == 8 and call.summary is not None and query_block == 64
        return Config(128, 32 if partial or small or major == 12 else 64, 8, 2)
    if partial or major == 12:
        # 64x128 spills in the loops.
        return Config(64, 64, 4, 2)
    # Measured on H100 with TMA at dim 64: 64x128, 4 warps, 2 stages reaches 68-87 % of ideal.
    return Config(64, 128, 4, 2)


def _rows_view(tensor: Tensor) -> tuple[list[int], list[int], tuple[int, int, int]] | None:
    """``[batch, tokens, heads, dim]`` as a matrix that TMA can tile.

    Returns:
        Shape and strides of the matrix, and (rows per batch element, rows per head, columns per
        head); None if the strides allow no such view.
    """
    batch, tokens, heads, dim = tensor.shape
    by_batch, by_token, by_head, _ = tensor.stride()
    if by_token < dim or tensor.numel() == 0:
        return None
    if batch > 1 and by_batch % by_token:
        return None
    batch_rows = by_batch // by_token if batch > 1 else 0
    if heads == 1 or by_head == dim:
        if (heads * dim) > by_token:
            return None
        rows = (batch - 1) * batch_rows + tokens
        return [rows, heads * dim], [by_token, 1], (batch_rows, 0, dim)
    if by_head % by_token:
        return None
    head_rows = by_head // by_token
    rows = (batch - 1) * batch_rows + (heads - 1) * head_rows + tokens
    return [rows, dim], [by_token, 1], (batch_rows, head_rows, 0)


def tma_reasons(call: AttentionCall) -> list[str]:
    """Why ``call`` cannot read keys and values through TMA descriptors; empty if it can."""
    reasons = []
    if not INTERPRETED and compute_capability(call.q.device)[0] < 9:
        reasons.append("TMA needs compute capability 9.0 or newer")
    if call.q.shape[-1] not in (64, 128):
        reasons.append(f"the TMA path takes head dims 64 and 128, got {call.q.shape[-1]}")
    if call.q.dtype == torch.float32:
        reasons.append("the TMA path takes 16-bit inputs")
    for name, tensor in (("k", call.k), ("v", call.v)):
        if tensor is None:
            continue
        tensor = last_contiguous(tensor)
        if _rows_view(tensor) is None:
            reasons.append(f"{name} with strides {tensor.stride()} is not a matrix of rows")
        elif tensor.data_ptr() % 16 or tensor.stride(1) * tensor.element_size() % 16:
            reasons.append(f"{name} is not aligned to 16 bytes")
    return reasons


def hopper_reasons(call: AttentionCall) -> list[str]:
    """Why ``call`` cannot be computed by the Gluon kernel for Hopper; empty if it can."""
    return gluon_reasons("attention", call)


def launch(call: AttentionCall, path: Path = "pointer", config: Config | None = None) -> Attended:
    """Runs the kernel.

    Args:
        call: Without values (``call.v`` None) only the LSE is computed.
        path: Which kernel: ``"pointer"`` and ``"tma"`` say how keys and values are read, the latter
            requires ``tma_reasons(call)`` empty; ``"hopper"`` is that of
            :mod:`dit_sparse.kernels.gluon.attention` and requires ``hopper_reasons(call)`` empty.
        config: Launch parameters; ``default_config`` if None.

    Returns:
        ``out [batch, q_len, heads, dim]`` (empty without values), ``lse [batch, heads, q_len]``
        fp32 and, with a summary, ``lse_kept`` as ``lse``.
    """
    if path == "hopper":
        return gluon_module("attention").launch(call)
    q, k = last_contiguous(call.q), last_contiguous(call.k)
    v = None if call.v is None else last_contiguous(call.v)
    batch, q_len, heads, _ = q.shape
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    out = q.new_empty((0,) if v is None else q.shape)
    if lse.numel() == 0:
        return Attended(out, lse)
    if config is None:
        plan = call.keep(path, lambda call: _plan(call, q, k, v, path, default_config(call, path)))
    else:
        plan = _plan(call, q, k, v, path, config)

    counts, indices = (None, None) if call.mask is None else lists_of(call.mask)
    flags, prefix = validity(call.key_valid)
    key_mean = value_mean = key_count = slope = bits = kept_lse = None
    if call.summary is not None and call.mask is not None:
        summary = call.summary
        key_mean, value_mean = (
            x.transpose(1, 2).contiguous() for x in (summary.key_mean, summary.value_mean)
        )
        key_count = as_float(summary.count)
        slope = summary.slope_as(q.dtype)
        bits = words_of(call.mask)
        kept_lse = torch.empty_like(lse)
    k_arg: Tensor | Boxes = k if plan.k_shape is None else Boxes(k, plan.k_shape)
    v_arg = v if v is None or plan.v_shape is None else Boxes(v, plan.v_shape)
    plan.launch(
        plan.grid,
        (q, k_arg, v_arg, None if v is None else out, lse, counts, indices, flags, prefix,
         key_mean, value_mean, key_count, slope, bits, kept_lse),
    )  # fmt: skip
    return Attended(out, lse, kept_lse)


class _Plan(NamedTuple):
    """How a kernel is launched, which follows from the signature of the call.

    Attributes:
        launch: The kernel with all arguments but tensors.
        grid: Programs.
        k_shape: How TMA reads keys; None if it does not.
        v_shape: How TMA reads values.
    """

    launch: Launch
    grid: tuple[int, int]
    k_shape: BoxShape | None
    v_shape: BoxShape | None


def _plan(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor | None, path: Path, config: Config
) -> _Plan:
    """How ``call`` is launched, given its operands with contiguous last dimensions."""
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    block = (config.tile_q, config.tile_k) if call.mask is None else call.mask.block
    tile_q, tile_k = min(config.tile_q, block[0]), min(config.tile_k, block[1])
    k_shape = v_shape = None
    k_steps: tuple[int, ...] = (*k.stride()[:3], 0)
    v_steps: tuple[int, ...] = (0, 0, 0, 0) if v is None else (*v.stride()[:3], 0)
    if path == "tma":
        k_shape, k_steps = box_shape(k, tile_k)
        if v is not None:
            v_shape, v_steps = box_shape(v, tile_k)
    launch = Launch(
        _attention_fwd_kernel,
        (*q.stride()[:3], *k_steps, *v_steps,
         *((0, 0, 0) if call.mask is None else list_steps(call.mask)),
         heads, q_len, kv_len, call.scale, call.scale * LOG2_E),
        DIM=dim, DIM_PAD=padded_dim(dim), TILE_Q=tile_q, TILE_K=tile_k,
        BLOCK_Q=block[0], BLOCK_K=block[1],
        NEEDS_MASK=call.key_valid is not None or kv_len % block[1] != 0,
        WITH_VALUES=v is not None, TMA=path == "tma",
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return _Plan(launch, (ceil_div(q_len, tile_q), batch * heads), k_shape, v_shape)


Steps = tuple[int, int, int, int]


def box_shape(tensor: Tensor, tile: int) -> tuple[BoxShape, Steps]:
    """How TMA reads ``tile`` rows of ``tensor`` at a time, and its steps in the kernel's order."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    view = _rows_view(tensor)
    if view is None:
        raise ValueError(f"strides {tensor.stride()} of {tuple(tensor.shape)} allow no TMA view")
    shape, strides, (batch_rows, head_rows, head_columns) = view
    boxes = BoxShape(TensorDescriptor, tensor.dtype, shape, strides, [tile, tensor.shape[-1]])
    return boxes, (batch_rows, 0, head_rows, head_columns)


def slope_reasons(call: AttentionCall) -> list[str]:
    """Why ``call`` cannot add first-order summaries; empty if it can."""
    if call.summary is None or call.summary.slope is None or padded_dim(call.q.shape[-1]) < 256:
        return []
    # The matrix of a head and the queries lie in shared memory: 160 KiB.
    if capability(call.q) in ((8, 0), (9, 0), (10, 0)):
        return []
    return ["first-order summaries of head dims above 128 need 160 KiB of shared memory"]


def _reasons(call: AttentionCall) -> list[str]:
    reasons = refusals(call.q, None if call.mask is None else call.mask.block)
    # Only asked of a device that exists: the others were refused above.
    reasons += [] if reasons else slope_reasons(call)
    if call.scale <= 0:
        reasons.append(f"scale must be positive, got {call.scale}")
    return reasons


def prefers_tma(dim: int, block: tuple[int, int] | None) -> bool:
    """Whether attention without summaries is faster without the kernel for Hopper, on Hopper."""
    # At head dim 64 exponentials take as long as products: its pipeline gains nothing there unless
    # two blocks share a tile.
    return dim == 64 and block in (None, (128, 128))


def choose_path(call: AttentionCall) -> Path:
    """The kernel that the implementations below use."""
    block = None if call.mask is None else call.mask.block
    narrow = call.summary is None and prefers_tma(call.q.shape[-1], block)
    if not narrow and not hopper_reasons(call):
        return "hopper"
    return "tma" if PREFER_TMA and not tma_reasons(call) else "pointer"


class TritonAttention(Impl):
    op, name, rank = "attention", "triton", RANK
    summaries = True

    def reasons(self, call: AttentionCall) -> list[str]:
        return _reasons(call)

    def __call__(self, call: AttentionCall) -> Attended:
        return launch(call, call.keep("path", choose_path))


class TritonRowLse(Impl):
    op, name, rank = "row_lse", "triton", RANK

    def reasons(self, call: AttentionCall) -> list[str]:
        return _reasons(call)

    def __call__(self, call: AttentionCall) -> Tensor:
        return launch(call, call.keep("path", choose_path)).lse
