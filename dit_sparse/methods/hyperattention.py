"""HyperAttention: nearby hashes in full, and a weighted sample of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import block_means, kept_count
from dit_sparse.methods.head_order import HeadOrder, regroup
from dit_sparse.methods.scored import Tiled, check_count, check_share


@dataclass(frozen=True)
class HyperAttention(Tiled):
    """Queries and keys sorted by a locality-sensitive hash attend around the diagonal.

    The hash of a vector is the sign pattern of its products with a few random directions, ranked in
    Gray code order, so that neighbours differ in one sign. Queries and keys are sorted by it, each
    for itself and in every head; what all of them have in common is taken off first (ours), because
    it would decide most signs for all alike. Query block p attends in full to the
    ``round((1 - sparsity) N)`` key blocks around place p. Every other block of n keys is
    represented by one of them, drawn uniformly, whose weight counts n times: with K the kept keys

        ``sum_{j in K} exp(s_ij) + sum_{blocks c not kept} n_c exp(s_{i, sample(c)})``

    is an unbiased estimate of the softmax denominator, and the numerator likewise.

    The paper cuts the sorted sequence into blocks of 256 that attend to themselves, and draws 256
    keys from all of it; where a drawn key lies in the own block it counts twice in the CUDA path of
    the reference code. Here the draw is one key a block and enters only where its block is skipped,
    so nothing counts twice, and the neighbourhood slides. The draw is a function of ``seed``, step
    and layer.

    Attributes:
        sparsity: Share of video blocks that a row skips (and samples), in [0, 1).
        bits: Random directions.
        sample: Whether skipped blocks are sampled; False drops them.
        seed: Of the directions and of the draws.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2310.05869, section 3, algorithms 1-3.
    """

    name = "hyperattention"

    sparsity: float = 0.8
    bits: int = 7
    sample: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity, least=0, below=1)
        check_count("bits", self.bits)

    @classmethod
    def exact(cls) -> HyperAttention:
        return cls(sparsity=0.0, warmup=0)

    def find(self, call: Call) -> PackedMask:
        blocks = video_blocks(call.layout, self.block)
        count = kept_count(self.sparsity, blocks)
        place = torch.arange(blocks, device=call.q.device)
        # At either end the neighbourhood stops sliding, so that all rows keep equally many.
        start = (place - count // 2).clamp(0, blocks - count)[:, None]
        keep = (place >= start) & (place < start + count)
        return self.pack(call, keep[None, None], count)

    def attention(self, call: Call, mask: PackedMask) -> Tensor:
        directions = random_directions(
            call.q.shape[-1], self.bits, self.seed + call.layer, call.q.device
        )
        video = call.layout.video
        valid = None if call.key_valid is None else call.key_valid[:, :video]
        orders = []
        for x in (call.q, call.k):
            products = x[:, :video] @ directions.to(x.dtype)
            mean, _ = block_means(products, video, valid)
            rank = gray_rank(products - mean.transpose(1, 2).to(x.dtype))
            orders.append(HeadOrder.by(rank.transpose(1, 2), call))
        queries, keys = orders
        moved = regroup(call, queries, keys)
        drawn = self.draw(moved) if self.sample else None
        return queries.undo(moved.attention(mask, drawn).out)

    def draw(self, call: Call) -> BlockSummary:
        """One key of every video block and how many it stands for.

        Args:
            call: Queries and keys sorted, padding of a block last.
        """
        batch, tokens, _, dim = call.k.shape
        video = video_blocks(call.layout, self.block)
        there = torch.ones(batch, tokens, dtype=torch.bool, device=call.k.device)
        there = there if call.key_valid is None else call.key_valid.clone()
        there[:, video * self.block :] = False
        columns = block_count(tokens, self.block)
        padded = torch.nn.functional.pad(there, (0, columns * self.block - tokens))
        count = padded.view(batch, columns, self.block).sum(-1)
        # Drawn on the host, so that all devices draw the same.
        number = (self.seed * 1_000_003 + call.step.index) * 1_000_003 + call.layer
        rng = torch.Generator().manual_seed(number % 2**63)
        uniform = torch.rand(batch, columns, call.heads.total, generator=rng)
        uniform = uniform[..., list(call.heads.own)].to(call.k.device)
        first = torch.arange(columns, device=call.k.device)[:, None] * self.block
        place = first + (uniform * count.unsqueeze(-1)).long()
        index = place.clamp(max=tokens - 1).unsqueeze(-1).expand(-1, -1, -1, dim)
        empty = (count == 0)[..., None, None]
        key, value = (x.gather(1, index).masked_fill(empty, 0) for x in (call.k, call.v))
        return BlockSummary(key, value, count.float())


@lru_cache(maxsize=256)
def random_directions(dim: int, bits: int, seed: int, device: torch.device) -> Tensor:
    """``[dim, bits]`` fp32, standard normal, the same on all devices."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(dim, bits, generator=rng).to(device)


def gray_rank(products: Tensor) -> Tensor:
    """Rank of a sign pattern in Gray code order, ``[...]`` int64; neighbours differ in one sign.

    Args:
        products: With some directions, ``[..., directions]``.
    """
    signs = (products > 0).long()
    # The inverse of n ^ (n >> 1): bit i of the rank is the parity of the signs from i upwards.
    parity = signs.flip(-1).cumsum(-1).flip(-1) % 2
    return (parity << torch.arange(signs.shape[-1], device=signs.device)).sum(-1)
