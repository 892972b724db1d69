"""k-means routing: tokens sorted by cluster, blocks chosen by how near their clusters are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_sparse.kernels.ops import work_dtype
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import scale_of
from dit_sparse.methods.head_order import HeadOrder, regroup
from dit_sparse.methods.hyperattention import gray_rank, random_directions
from dit_sparse.methods.scored import BlockScored, check_count

# Lloyd iterations of a search that starts from the centroids of the one before.
_WARM_ITERATIONS = 2
# Signs in the hash by which clusters are put in order.
_ORDER_BITS = 12
# Distances held at a time.
_SCRATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Routing(BlockScored):
    """Per head, queries and keys are clustered, sorted by cluster, and matched by their centroids.

    With centroids a of the queries and b of n_b keys each, the attention of a query of a to one key
    of b is estimated as ``P_ab = exp(s_ab) / sum_b n_b exp(s_ab)``, ``s_ab = qbar_a . kbar_b /
    sqrt(d)``. Sorted by cluster, block p holds m_pa queries of a and block c holds m_cb keys of b,
    so the mass of the block is about ``W_pc = sum_ab m_pa P_ab m_cb``; every row keeps the blocks
    of largest W. Clusters are of any size; the blocks over them are not, and the budget is exact.

    The Routing Transformer trains with centroids common to queries and keys and lets every cluster
    attend to itself alone. SVG2 clusters queries and keys apart and chooses pairs of clusters by
    cumulative P; it needs a kernel for blocks of any size.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1).
        clusters: Of queries and of keys; None is the square root of the number of video tokens, as
            in the Routing Transformer.
        iterations: Lloyd iterations of the first search; later ones start from its centroids and
            take two.
        shared: One set of centroids for queries and keys scaled to length 1 (Routing Transformer)
            instead of one each for the vectors as they are (SVG2).
        every: Steps that clusters and mask serve.

    Raises:
        ValueError: On a value outside these ranges.

    Source: Routing Transformer, arXiv 2003.05997, section 4; SVG2, arXiv 2505.18875, section 4.
    """

    name = "routing"

    clusters: int | None = None
    iterations: int = 10
    shared: bool = False
    every: int = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("iterations", self.iterations)
        if self.clusters is not None:
            check_count("clusters", self.clusters)

    def attention(self, call: Call, mask: PackedMask) -> Tensor:
        if "orders" not in call.memory:
            # Text shares the only block with video: nothing was searched, everything is kept.
            return super().attention(call, mask)
        queries, keys = call.memory["orders"]
        return queries.undo(regroup(call, queries, keys).attention(mask).out)

    def scores(self, call: Call) -> Tensor:
        video = call.layout.video
        valid = None if call.key_valid is None else call.key_valid[:, :video]
        points = [_exists(x[:, :video], valid).transpose(1, 2) for x in (call.q, call.k)]
        labels, centroids = self._cluster(call, points, valid)
        call.memory["centroids"] = centroids
        orders = tuple(HeadOrder.by(label, call) for label in labels)
        call.memory["orders"] = orders
        count, blocks = centroids[0].shape[2], video_blocks(call.layout, self.block)
        (queries, _), (keys, size) = (
            _means(x, label, count, valid) for x, label in zip(points, labels, strict=True)
        )
        rows, columns = (
            _held(label, order, count, self.block, valid)[:, :, :blocks].to(keys.dtype)
            for label, order in zip(labels, orders, strict=True)
        )
        scores = scale_of(call) * (queries @ keys.mT)  # of one query to one key
        scores = scores.masked_fill((size == 0)[:, :, None], float("-inf"))
        total = (scores + size.log()[:, :, None]).logsumexp(-1, keepdim=True)
        return rows @ (scores - total).exp() @ columns.mT

    def _cluster(
        self, call: Call, points: list[Tensor], valid: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels ``[batch, heads, video]`` and centroids of queries and of keys."""
        tokens = points[0].shape[2]
        count = min(tokens, self.clusters or max(1, round(math.sqrt(tokens))))
        if self.shared:
            both = torch.cat([torch.nn.functional.normalize(x, dim=-1) for x in points], 2)
            both_valid = None if valid is None else valid.repeat(1, 2)
            known = call.memory.get("centroids", [None])[0]
            label, centroid = self._lloyd(both, known, count, both_valid)
            return list(label.split(tokens, 2)), [centroid, centroid]
        known = call.memory.get("centroids", [None, None])
        found = [self._lloyd(x, k, count, valid) for x, k in zip(points, known, strict=True)]
        return [label for label, _ in found], [centroid for _, centroid in found]

    def _lloyd(
        self, x: Tensor, centroids: Tensor | None, count: int, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        iterations = self.iterations if centroids is None else _WARM_ITERATIONS
        if centroids is None:
            # Evenly spaced tokens: the same in every run, and from every frame and region.
            start = (torch.arange(count, device=x.device) * 2 + 1) * x.shape[2] // (2 * count)
            centroids = x[:, :, start].to(work_dtype(x.dtype))
        for _ in range(iterations):
            means, size = _means(x, nearest(x, centroids), count, valid)
            # A cluster that lost all its tokens waits where it is.
            centroids = torch.where(size.unsqueeze(-1) > 0, means, centroids)
        # Numbered so that neighbours are alike: a block over the border of two clusters mixes less.
        directions = random_directions(x.shape[-1], _ORDER_BITS, 0, x.device)
        rank = gray_rank(
            (centroids - centroids.mean(2, keepdim=True)) @ directions.to(centroids.dtype)
        )
        order = rank.argsort(dim=-1, stable=True).unsqueeze(-1)
        centroids = centroids.take_along_dim(order, 2)
        return nearest(x, centroids), centroids


def _exists(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.masked_fill(~valid[..., None, None], 0)


def _parts(x: Tensor, count: int) -> list[slice]:
    """Cuts the tokens of ``x`` ``[batch, heads, tokens, dim]`` by the scratch of ``count`` each."""
    step = max(1, _SCRATCH_ELEMENTS // (x.shape[0] * x.shape[1] * max(count, x.shape[-1])))
    return [slice(start, start + step) for start in range(0, x.shape[2], step)]


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Number of the centroid at the least Euclidean distance, ``[batch, heads, tokens]`` int64.

    Args:
        x: ``[batch, heads, tokens, dim]``.
        centroids: ``[batch, heads, clusters, dim]`` fp32 (fp64 for fp64).
    """
    half = centroids.square().sum(-1).unsqueeze(2) / 2
    parts = _parts(x, centroids.shape[2])
    labels = [
        (x[:, :, part].to(centroids.dtype) @ centroids.mT - half).argmax(-1) for part in parts
    ]
    return torch.cat(labels, -1)


def _means(x: Tensor, label: Tensor, count: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means ``[batch, heads, clusters, dim]`` and sizes ``[batch, heads, clusters]``."""
    work = work_dtype(x.dtype)
    sums = torch.zeros(*x.shape[:2], count, x.shape[-1], dtype=work, device=x.device)
    size = torch.zeros(*x.shape[:2], count, dtype=work, device=x.device)
    numbers = torch.arange(count, device=x.device)
    for part in _parts(x, count):
        # As a product rather than a scatter, whose order of addition varies on a GPU.
        member = (label[:, :, part, None] == numbers).to(work)
        if valid is not None:
            member = member * valid[:, None, part, None]
        sums += member.mT @ x[:, :, part].to(work)
        size += member.sum(2)
    return sums / size.clamp(min=1).unsqueeze(-1), size


def _held(label: Tensor, order: HeadOrder, count: int, block: int, valid: Tensor | None) -> Tensor:
    """Tokens of clusters in blocks of the sorted order, ``[batch, heads, blocks, clusters]``."""
    batch, heads, tokens = label.shape
    perm = order.perm[..., :tokens].long()
    place = torch.arange(tokens, device=label.device) // block * count
    slot = label.gather(-1, perm) + place
    there = torch.ones(1, 1, 1, device=label.device).expand(batch, heads, tokens)
    if valid is not None:
        there = valid[:, None].expand(batch, heads, tokens).gather(-1, perm).float()
    blocks = block_count(tokens, block)
    held = torch.zeros(batch, heads, blocks * count, device=label.device)
    return held.scatter_add_(-1, slot, there).view(batch, heads, blocks, count)
