"""HiP: key ranges halved and pruned, round by round, until they are single blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.kernels.ops import work_dtype
from dit_sparse.layout import Ordering, TokenLayout
from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import kept_count, scale_of
from dit_sparse.methods.scored import BlockSearched, check_share

# Keys, queries and scores held at a time.
_SCRATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class HiP(BlockSearched):
    """Every query block narrows k ranges of keys down to k blocks.

    It starts from k even ranges of the N key blocks. A round halves every range, scores each half
    by one representative, ``max_{i in p} q_i . k_r / sqrt(d)`` with r the middle token, and keeps
    the k best halves. After ``ceil(log2(N / k))`` rounds the ranges are blocks. A round costs 2 k
    scores a query; the range around the query block's own place is never dropped.

    In Morton order a range is a box in space and time, to within the grid's edges, and its
    representative is near all of it. The code of the authors is not free to use; this is written
    from the paper.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1): ``k = round((1 - s) N)``.
        morton: Whether tokens are in Morton order; False is raster order, as for text.
        every: Steps that a mask serves.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2406.09827, section 3 and algorithm 1.
    """

    name = "hip"

    sparsity: float = 0.8
    morton: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sparsity", self.sparsity, least=0, below=1)

    @classmethod
    def exact(cls) -> HiP:
        return cls(sparsity=0.0, warmup=0)

    def order(self, call: Call) -> Ordering | None:
        if not self.morton:
            return call.tile_order(None)
        return morton_ordering(call.layout, call.q.device)

    def find(self, call: Call) -> PackedMask:
        blocks = video_blocks(call.layout, self.block)
        count = kept_count(self.sparsity, blocks)
        batch, _, heads, dim = call.q.shape
        per_row = batch * heads * (2 * count + self.block) * (dim + self.block)
        step = max(1, _SCRATCH_ELEMENTS // per_row)
        rows = [
            self._narrow(call, torch.arange(start, min(start + step, blocks)), count)
            for start in range(0, blocks, step)
        ]
        chosen = torch.cat(rows, 2)
        keep = torch.zeros(*chosen.shape[:3], blocks, dtype=torch.bool, device=chosen.device)
        return self.pack(call, keep.scatter_(-1, chosen, True), count)

    def _narrow(self, call: Call, rows: Tensor, count: int) -> Tensor:
        """The key blocks of the query blocks ``rows``, ``[batch, heads, rows, count]`` int64."""
        blocks = video_blocks(call.layout, self.block)
        edges = torch.arange(count + 1, device=call.q.device) * blocks // count
        shape = (call.q.shape[0], call.q.shape[2], len(rows), count)
        start, stop = (e.expand(shape) for e in (edges[:-1], edges[1:]))
        queries, alive = self._queries(call, rows)
        own = rows.to(call.q.device)[:, None]
        # On the host: the longest range is known without looking.
        longest = -(-blocks // count)
        while longest > 1:
            middle = (start + stop + 1) // 2
            halves = (torch.cat([start, middle], -1), torch.cat([middle, stop], -1))
            score = self._score(call, queries, alive, *halves)
            score = score.masked_fill((halves[0] <= own) & (own < halves[1]), float("inf"))
            best = score.topk(count, -1).indices
            start, stop = (half.gather(-1, best) for half in halves)
            longest = -(-longest // 2)
        return start

    def _queries(self, call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of ``rows``, ``[batch, heads, rows, block, dim]``, and which of them exist."""
        place = (rows[:, None] * self.block + torch.arange(self.block)).to(call.q.device)
        alive = (place < call.layout.video).expand(call.q.shape[0], -1, -1)
        place = place.clamp(max=call.layout.video - 1)
        if call.key_valid is not None:
            alive = alive & call.key_valid[:, place]
        queries = call.q[:, place].permute(0, 3, 1, 2, 4).to(work_dtype(call.q.dtype))
        return queries.masked_fill(~alive[:, None, ..., None], 0), alive

    def _score(
        self, call: Call, queries: Tensor, alive: Tensor, start: Tensor, stop: Tensor
    ) -> Tensor:
        """Of the middle token of every range, -inf for an empty range or padding."""
        last = min(video_blocks(call.layout, self.block) * self.block, call.layout.video) - 1
        place = ((start + stop) * self.block // 2).clamp(max=last)
        there = start < stop
        flat = place.flatten(2).transpose(1, 2)  # [batch, rows * ranges, heads]
        keys = call.k.gather(1, flat.unsqueeze(-1).expand(-1, -1, -1, call.k.shape[-1]))
        keys = keys.transpose(1, 2).unflatten(2, place.shape[2:]).to(queries.dtype)
        if call.key_valid is not None:
            real = call.key_valid.gather(1, place.flatten(1)).view_as(place)
            keys = keys.masked_fill(~real.unsqueeze(-1), 0)
            there = there & real
        scores = scale_of(call) * (queries @ keys.mT)  # [batch, heads, rows, block, ranges]
        scores = scores.masked_fill(~alive[:, None, ..., None], float("-inf"))
        return scores.amax(-2).masked_fill(~there, float("-inf"))


@lru_cache(maxsize=64)
def morton_ordering(layout: TokenLayout, device: torch.device) -> Ordering:
    """Video tokens in Morton order (bits of frame, row and column, highest first), text last."""
    start = layout.video_start
    coords = layout.coords()[start : start + layout.video]
    code = torch.zeros(layout.video, dtype=torch.int64)
    for bit in reversed(range(max(layout.grid).bit_length())):
        for axis in range(3):
            code = code << 1 | coords[:, axis] >> bit & 1
    after = torch.arange(start + layout.video, layout.tokens)
    perm = torch.cat([start + code.argsort(), torch.arange(start), after])
    return Ordering.from_perm(perm).to(device)
