"""What the loops of all attention kernels have in common."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def online_softmax(scores, peak, denom, scale_log2, MASKED: tl.constexpr):
    """One tile of scores joins a running softmax in base 2.

    Args:
        scores: ``[queries, keys]`` fp32, not scaled yet; -inf where a key is masked.
        peak: Largest scaled score so far, ``[queries]``.
        denom: Sum of the weights so far, relative to the peak.
        scale_log2: Scale of the scores times log2(e).
        MASKED: Whether a row may have seen no key yet.

    Returns:
        The weights of the tile, the factor of everything summed before it, and the new denominator
        and peak.
    """
    NEG_INF: tl.constexpr = float("-inf")
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    shift = new_peak
    if MASKED:
        # A row that has seen no key yet: -inf minus -inf would be NaN.
        shift = tl.where(new_peak == NEG_INF, 0.0, new_peak)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(peak - shift)
    return weights, decay, denom * decay + tl.sum(weights, 1), new_peak


@triton.jit
def listed_counts(
    counts, indices, mask_row, inside, LISTED: tl.constexpr, NEEDS_MASK: tl.constexpr, columns
):
    """How many blocks a mask row keeps, and how many of them need no masking.

    A list ascends, so that these come first.

    Args:
        counts: Lengths of all lists, or None without lists.
        indices: The row's list.
        mask_row: Number of the row.
        inside: Blocks that lie wholly inside the valid prefix of the keys.
        LISTED: Whether there are lists; all blocks are kept if not.
        NEEDS_MASK: Whether any block may need masking.
        columns: Key blocks.
    """
    CHUNK: tl.constexpr = 256
    if LISTED:
        count = tl.load(counts + mask_row)
        unmasked = count
        if NEEDS_MASK:
            unmasked = count * 0
            for chunk in range(0, count, CHUNK):
                at = chunk + tl.arange(0, CHUNK)
                column = tl.load(indices + at, mask=at < count, other=2147483647)
                unmasked += tl.sum((column < inside).to(tl.int32), 0)
    else:
        count = columns
        unmasked = tl.minimum(inside, count)
    return count, unmasked
