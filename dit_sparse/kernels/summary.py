"""Summaries of key blocks: what a skipped block still contributes to its rows.

Dropping a block takes its share out of the softmax. A summary keeps the share at almost no cost:
block j of n_j keys acts as one key, its mean, that counts n_j times (zeroth order); what its keys
deviate from their mean is added for all blocks together by one matrix per head (first order).

Source: the zeroth order is common to PISA (arXiv 2602.01077), SVG-EAR (arXiv 2603.08982) and
Sol-Attn (arXiv 2607.24027); the first-order term is PISA's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.mask import BlockMask, PackedMask

# Scores that :func:`add_skipped` holds at a time.
_SCRATCH_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class BlockSummary:
    """Means of all key blocks, for the rows that skip them.

    With s the scale, row i adds for every skipped block j ``n_j exp(s q_i.kbar_j)`` to its softmax
    denominator and the same times ``vbar_j`` to its numerator. With a slope, and with t_i the share
    of the denominator that skipped blocks hold, the output gets ``+ t_i s (q_i slope)``.

    By Jensen's inequality ``n_j exp(s q_i.kbar_j)`` never exceeds the true share of the block, so
    the log-sum-exp over kept keys and summaries never exceeds the dense one.

    Attributes:
        key_mean: kbar, ``[batch, kv_blocks, heads, dim]`` in the keys' dtype.
        value_mean: vbar, same.
        count: n, keys that exist in each block, ``[batch, kv_blocks]`` fp32; a block with 0
            contributes nothing where it is skipped.
        slope: ``sum_j sum_{t in j} (k_t - kbar_j) v_t^T / sum_j n_j``, ``[batch, heads, dim, dim]``
            fp32, or None.
        rounded: The slope in the keys' dtype, where whoever made it rounded it at once, or None.
    """

    key_mean: Tensor
    value_mean: Tensor
    count: Tensor
    slope: Tensor | None = None
    rounded: Tensor | None = None

    def slope_as(self, dtype: torch.dtype) -> Tensor | None:
        """The slope as kernels multiply by it, contiguous; None if there is none."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return None if self.slope is None else self.slope.to(dtype).contiguous()


def add_skipped(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    mask: BlockMask | PackedMask,
    summary: BlockSummary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Adds the summaries of the blocks that ``mask`` skips to attention over those it keeps.

    For implementations that attend to kept blocks only; ``kv_blocks / kv_len`` of dense work.

    Args:
        out: Attention over the kept blocks, ``[batch, q_len, heads, dim]``.
        lse: Its log-sum-exp, ``[batch, heads, q_len]``.
        q: Queries ``[batch, q_len, heads, dim]``.
        mask: The kept blocks.
        summary: Of all blocks.
        scale: Factor on the scores.

    Returns:
        Output and log-sum-exp over kept keys and summaries; shapes and dtypes as given.
    """
    batch, q_len, heads, _ = q.shape
    columns, work = mask.shape[3], lse.dtype
    keep = mask.dense()
    log_count = summary.count.to(work).log()[:, None]  # [batch, 1, kv_blocks]
    total = torch.empty_like(lse)
    result = torch.empty_like(out)
    rows = max(1, _SCRATCH_ELEMENTS // (batch * columns * mask.block[0])) * mask.block[0]
    for head in range(heads):
        key, value = (
            x[:, :, head].to(work) for x in (summary.key_mean, summary.value_mean)
        )  # [batch, kv_blocks, dim]
        head_keep = keep[:, head if keep.shape[1] > 1 else 0]
        for start in range(0, q_len, rows):
            part = slice(start, min(start + rows, q_len))
            blocks = slice(start // mask.block[0], -(-part.stop // mask.block[0]))
            kept = head_keep[:, blocks].repeat_interleave(mask.block[0], 1)
            kept = kept[:, : part.stop - start]
            query = q[:, part, head].to(work)
            scores = scale * (query @ key.mT) + log_count
            scores.masked_fill_(kept, float("-inf"))
            tail = scores.logsumexp(-1)  # [batch, rows]
            both = torch.logaddexp(lse[:, head, part], tail)
            # -inf minus -inf is NaN; a row without keys and summaries has output 0.
            floor = both.masked_fill(both == float("-inf"), 0.0).unsqueeze(-1)
            added = (scores - floor).exp() @ value
            if summary.slope is not None:
                share = (tail.unsqueeze(-1) - floor).exp()
                added += share * scale * (query @ summary.slope[:, head].to(work))
            own = (lse[:, head, part].unsqueeze(-1) - floor).exp()
            result[:, part, head] = (own * out[:, part, head].to(work) + added).to(out.dtype)
            total[:, head, part] = both
    return result, total
