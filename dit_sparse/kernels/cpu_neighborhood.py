"""Attention inside the partial blocks of a neighborhood, on the CPU.

One query block at a time, all heads together, since they share the rule: the listed key blocks are
gathered, the rule becomes an additive mask ``[block, keys]``, and PyTorch's flash kernel does the
rest. The result is merged with attention over the full blocks.
"""

from __future__ import annotations

import torch

from dit_sparse.kernels import cpu
from dit_sparse.kernels.ops import Attended, Impl, NeighborhoodCall, merge


class CpuNeighborhood(Impl):
    """Scratch: keys and values of one query block for as many heads as fit, at least one."""

    op, name, rank = "neighborhood", "cpu", 50

    def reasons(self, call: NeighborhoodCall) -> list[str]:
        return cpu._reasons(call.q, call.k, call.v)

    def __call__(self, call: NeighborhoodCall) -> Attended:
        batch, tokens, heads, dim = call.q.shape
        (size, width), (rows, columns) = call.partial.block, call.partial.shape[2:]
        q = cpu._head_major(call.q, size).view(batch, heads, rows, size, dim)
        k = cpu._head_major(call.k, width, call.key_valid).view(batch, heads, columns, -1)
        v = cpu._head_major(call.v, width, call.key_valid).view(batch, heads, columns, -1)
        padding = cpu._key_bias(call.k, call.key_valid, width)  # [batch, columns, width]
        out = torch.zeros_like(q)
        lse = q.new_full((batch, heads, rows, size), float("-inf"))
        within_q, within_k = torch.arange(size), torch.arange(width)
        counts = call.partial.kv_num_blocks[0, 0].tolist()
        for row, count in enumerate(counts):
            if count == 0:
                continue
            listed = call.partial.kv_indices[0, 0, row, :count].long()
            keys = (listed[:, None] * width + within_k).flatten()
            queries = row * size + within_q
            # Positions past the end repeat the last token; as keys they are padding.
            seen = call.mask.visible(queries.clamp(max=tokens - 1), keys.clamp(max=tokens - 1))
            rule = q.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
            group = max(1, cpu._SCRATCH // (2 * len(keys) * dim * q.element_size()))
            for b in range(batch):
                bias = rule if padding is None else rule + padding[b, listed].flatten()
                for first in range(0, heads, group):
                    part = slice(first, first + group)
                    attended, found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                        q[None, b, part, row],
                        k[b, part][:, listed].view(1, -1, len(keys), dim),
                        v[b, part][:, listed].view(1, -1, len(keys), dim),
                        attn_mask=bias[None, None],
                        scale=call.scale,
                    )
                    # The kernel gives out 0 but LSE 0 to a row without keys.
                    empty = (bias == float("-inf")).all(-1)
                    out[b, part, row] = attended[0].masked_fill(empty[:, None], 0.0)
                    lse[b, part, row] = found[0].masked_fill(empty, float("-inf"))
        result = Attended(
            out.flatten(2, 3)[:, :, :tokens].transpose(1, 2), lse.flatten(2)[..., :tokens]
        )
        whole = result if call.seen is None else merge(result, call.seen)
        return Attended(whole.out.to(call.q.dtype).contiguous(), whole.lse.contiguous())
