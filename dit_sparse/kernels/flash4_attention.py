"""Attention by FlashAttention-4 (package ``flash-attn-4``), which computes block lists on Hopper.

It overlaps the softmax of one block with the products of the next, as our own kernel for Hopper
does (:mod:`dit_sparse.kernels.gluon.attention`), and needs no triton with Gluon. It is compiled by
CuTe DSL at its first use, seconds for each kind of call.

Summaries of skipped blocks are a second pass: the Triton kernel over empty lists computes their
part alone, and the two parts are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from dit_sparse.kernels.flash4_lists import flash_lists
from dit_sparse.kernels.nvidia import device_reasons, dtype_reasons
from dit_sparse.kernels.ops import Attended, AttentionCall, Impl
from dit_sparse.kernels.probe import probe_reasons
from dit_sparse.mask import BlockMask

# Keys of a block are one tile of the kernel, queries one or more of its tiles of 64 or 128.
_KEY_BLOCKS = (64, 128)


class _Library(NamedTuple):
    """What is used of the package."""

    attention: Callable[..., Any]
    lists: Callable[..., Any]
    existing_key: Callable[..., Any]


@lru_cache(maxsize=1)
def _library() -> _Library | str:
    """The package, or why it cannot be used. Importing it takes seconds."""
    try:
        import cutlass
        import cutlass.cute as cute
        from flash_attn.cute import utils
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        return f"the package flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    if "block_size" not in BlockSparseTensorsTorch._fields:
        return "this flash-attn-4 knows no block_size; install 4.0.0b36 or newer"

    @cute.jit
    def existing_key(batch, head, query, key, lengths, tensors):
        # Positions come as vectors of one element; tensors[0] is [batch, kv_len] int32.
        flag = utils.scalar_to_ssa(tensors[0][batch[0], key[0]], cutlass.Int32)
        return flag == utils.scalar_to_ssa(1, cutlass.Int32)

    return _Library(flash_attn_func, BlockSparseTensorsTorch, existing_key)


def _attend(call: AttentionCall) -> Attended:
    library = _library()
    assert not isinstance(library, str) and call.v is not None
    value, options = call.v, {}
    mask = call.mask
    if mask is None and call.key_valid is not None:
        mask = BlockMask.full(128, (call.q.shape[1], call.k.shape[1]), call.q.device)
    if mask is not None:
        lists = flash_lists(_expand(mask), call.q.shape[0], call.q.shape[2], call.key_valid)
        options["block_sparse_tensors"] = library.lists(*lists, block_size=mask.block)
    if call.key_valid is not None:
        options["mask_mod"] = library.existing_key
        flags = call.key_valid.int().contiguous()
        # Which dimension is the contiguous one cannot be told from the strides of a batch of 1.
        flags.__leading_dim__ = 1  # type: ignore[attr-defined]
        options["aux_tensors"] = [flags]
        # A weight of 0 times a value that is NaN would be NaN.
        value = value.masked_fill(~call.key_valid[..., None, None], 0.0)
    with torch.cuda.device_of(call.q), torch.no_grad():
        out, lse = library.attention(
            call.q, call.k, value, softmax_scale=call.scale, return_lse=True, **options
        )
    return Attended(out, lse)


def _expand(mask: Any) -> BlockMask:
    from dit_sparse.kernels.triton_mask import expand

    return expand(mask)


def skipped_part(call: AttentionCall) -> Attended:
    """Attention over the summaries of the blocks that ``call.mask`` skips, and nothing else.

    The share of skipped blocks in this part is 1, so its first-order term is whole; merging gives
    it the weight that it has in :class:`~dit_sparse.kernels.summary.BlockSummary`.
    """
    from dit_sparse.kernels.triton_attention import choose_path, launch

    assert call.mask is not None
    mask = _expand(call.mask)
    empty = BlockMask(
        torch.zeros_like(mask.kv_num_blocks),
        mask.kv_indices[..., :1],
        mask.block,
        mask.seq,
        mask.packed_bits(),
    )
    alone = replace(call, mask=empty)
    alone.remember(call.keep("skipped part", lambda _: {}))
    return launch(alone, alone.keep("path", choose_path))


class FlashAttention4(Impl):
    op, name, rank = "attention", "flash-attn-4", 105
    summaries = True
    packages = ("flash-attn-4",)
    partner = "triton"

    def priority(self, call: AttentionCall) -> int:
        # Dense it was ahead of cuDNN on an H100; block lists are for tables to say.
        return 115 if call.mask is None and call.key_valid is None else 95

    def reasons(self, call: AttentionCall) -> list[str]:
        # Its blocks have 256 queries on compute capability 10; lists are ignored on 8 and absent
        # on 12.
        if reasons := device_reasons(call.q, 9) or static_reasons(call):
            return reasons
        library = _library()
        if isinstance(library, str):
            return [library]
        return probe_reasons(self.name, _attend, call)

    def __call__(self, call: AttentionCall) -> Attended:
        kept = _attend(call)
        if call.summary is None or call.mask is None:
            return kept
        from dit_sparse.kernels.triton_merge import merge_into

        whole = merge_into(kept, skipped_part(call))
        return Attended(whole.out, whole.lse, kept.lse)


def static_reasons(call: AttentionCall) -> list[str]:
    """Why the kernel cannot compute ``call`` on any device."""
    reasons = dtype_reasons(call.q)
    dim = call.q.shape[-1]
    if dim % 8 or dim > 128:
        # Above 128 its key tiles have 112 or 80 keys, which no block of ours is a multiple of.
        reasons.append(f"head dim must be a multiple of 8 up to 128, got {dim}")
    if call.scale <= 0:
        reasons.append(f"scale must be positive, got {call.scale}")
    if call.q.numel() == 0 or call.k.numel() == 0:
        reasons.append("takes no empty sequence")
    if max(call.q.numel(), call.k.numel()) >= 2**31:
        reasons.append("was not tested with 2**31 elements or more")
    if call.mask is not None:
        rows, columns = call.mask.block
        if rows % 64:
            reasons.append(f"query blocks must be a multiple of 64 tokens, got {rows}")
        if columns not in _KEY_BLOCKS:
            reasons.append(
                f"key blocks must be one tile of its kernel, {_KEY_BLOCKS} tokens, got {columns}"
            )
        if call.summary is not None:
            from dit_sparse.kernels.triton_common import refusals

            reasons += [
                f"its second pass for summaries is Triton's: {reason}"
                for reason in refusals(call.q, call.mask.block)
            ]
    return reasons
