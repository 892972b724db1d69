"""Scores of key blocks from the mean queries of blocks and the summaries of keys and values.

Unlike those of :mod:`dit_sparse.methods.estimates` they take the queries of some blocks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import Block, block_sides
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import block_means, scale_of

# Scores that :func:`error_scores` holds at a time.
_SCRATCH_ELEMENTS = 1 << 24


def pooled_softmax(call: Call, summary: BlockSummary, block: Block) -> Tensor:
    """Softmax over key blocks of the scores of mean queries and mean keys.

    ``P[p, j] = softmax_j(s qbar_p.kbar_j + log n_j)``, fp32 (fp64 for fp64)
    ``[batch, heads, q_blocks, kv_blocks]``; blocks with text or without a valid key get 0.

    Args:
        call: Any queries, ordered by blocks.
        summary: Of its key blocks.
        block: Tokens in a block, or in a (query, key) block.

    Source: the block-sparse estimate of MInference (arXiv 2407.02490) and PISA (arXiv 2602.01077).
    """
    queries, _ = block_means(call.q, block_sides(block)[0])
    keys = summary.key_mean.transpose(1, 2).to(queries.dtype)
    scores = scale_of(call) * (queries @ keys.mT)
    return (scores + summary.count.log()[:, None, None]).softmax(-1).nan_to_num()


def error_scores(call: Call, summary: BlockSummary, block: Block) -> Tensor:
    """What the mean of a key block gets wrong about it, as the mean query of a block sees it.

    ``E[p, j] = sum_{t in j} |exp(s qbar_p.k_t) v_t - exp(s qbar_p.kbar_j) vbar_j|^2`` over the
    largest E of its row, fp32 (fp64 for fp64) ``[batch, heads, q_blocks, kv_blocks]``; blocks with
    text get 0.

    Costs one part in as many as a query block has tokens of the scores of dense attention.

    Args:
        call: Any queries, ordered by blocks.
        summary: Of its key blocks.
        block: Tokens in a block, or in a (query, key) block.

    Source: SVG-EAR (arXiv 2603.08982), whose blocks are clusters.
    """
    side, block = block_sides(block)
    queries, _ = block_means(call.q, side)
    batch, heads, rows, _ = queries.shape
    video, work = video_blocks(call.layout, block), queries.dtype
    found = queries.new_zeros(batch, heads, rows, summary.count.shape[1])
    size = video * block
    tokens = min(size, call.layout.video)
    live = torch.ones(batch, tokens, dtype=torch.bool, device=call.q.device)
    live = pad(live if call.key_valid is None else call.key_valid[:, :tokens], (0, size - tokens))
    step = max(1, _SCRATCH_ELEMENTS // max(1, batch * size))
    for head in range(heads):
        k, v = (
            pad(x[:, :tokens, head].to(work), (0, 0, 0, size - tokens))
            .masked_fill(~live[..., None], 0)
            for x in (call.k, call.v)
        )  # fmt: skip
        key_mean, value_mean = (
            x[:, :video, head].to(work) for x in (summary.key_mean, summary.value_mean)
        )
        grouped = v.view(batch, video, block, -1)
        along = (grouped * value_mean[:, :, None]).sum(-1)
        own = grouped.square().sum(-1)
        mean_size = summary.count[:, :video].to(work) * value_mean.square().sum(-1)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            query = scale_of(call) * queries[:, head, part]
            score = (query @ k.mT).masked_fill(~live[:, None], float("-inf"))
            mean_score = query @ key_mean.mT
            peak = torch.cat([score, mean_score], -1).amax(-1, keepdim=True)
            exact = (score - peak).exp().view(batch, -1, video, block)
            mean = (mean_score - peak).exp()
            # The square of the difference, term by term.
            error = (exact.square() * own[:, None]).sum(-1)
            error += mean.square() * mean_size[:, None]
            error -= 2 * mean * (exact * along[:, None]).sum(-1)
            error.clamp_(min=0)
            largest = error.amax(-1, keepdim=True) if video else error
            found[:, head, part, :video] = error / largest.clamp(min=1e-30)
    return found
