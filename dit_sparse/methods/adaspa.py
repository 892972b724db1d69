"""AdaSpa: exact block search at a few steps, reused in between.

Source: AdaSpa, arXiv 2502.21079. There is no public code; where the text leaves a choice open it
is made here and said so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dit_sparse.mask import Block, PackedMask, block_sizes
from dit_sparse.methods.auto_block import AutoBlock
from dit_sparse.methods.base import Call, check_box, video_blocks
from dit_sparse.schedule import Phase, Schedule

# Heads whose mask keeps more than this share of their attention mass may give some of it up
# (section 4.3, "head-adaptive").
EASY_RECALL = 0.8
# What is left of a block of 64 are the 16 rows that kernels take at least.
ROW_STRIDES = (1, 2, 4)


@dataclass(frozen=True)
class AdaSpa(AutoBlock):
    """Block-sparse attention under masks searched online, per head, by exact attention mass.

    With block mass ``W[p, c] = sum_{i in p, j in c} exp(s_ij - LSE_i)`` every query block keeps the
    same number ``k_h = round((1 - s_h) * N)`` of the N video key blocks with the largest mass
    ("row-wise" selection). The first search is fused with a dense step and caches LSE; later
    searches need one pass over the queries and keys because LSE hardly moves between steps.

    Head-adaptive sparsity: with recall_h the share of mass kept at base sparsity s and
    ``n = #{h : recall_h > 0.8}``, the n heads of highest recall get ``(1 + s) / 2``, the n of
    lowest recall ``(3 s - 1) / 2``, the others s; the mean is exactly s. The paper leaves open what
    happens when the two groups overlap or the lower level is negative: here n is at most half the
    heads, and below s = 1/3 the levels are 0 and 2 s, which keeps the mean.

    Text blocks (and blocks that mix text and video) are kept as rows and as columns and are not
    charged to the budget, so text conditioning stays exact.

    Attributes:
        sparsity: Share of video blocks that a head skips on average, in [0, 1).
        search: When masks are searched, see :class:`~dit_sparse.schedule.Schedule`. The paper's 10
            and 30 of 50 steps, as shares.
        block: Tokens in a query and a key block, 64 or 128; a pair if they differ. ``"auto"`` is
            64, but (128, 64) where kernels are faster with it, see
            :func:`~dit_sparse.kernels.blocks.fastest_block`.
        tile: Order of the video tokens: (frames, height, width) of a tile that becomes one run, or
            None for raster order as in the paper.
        head_adaptive: Whether heads get one of three sparsities by their recall.
        lse_cache: Whether later searches reuse the LSE of the first one.
        row_stride: Of how many query rows searches look at one: 1, 2 or 4; a pair if the first
            search and later ones differ. Block mass is that of these rows, which are spread over
            each query block, see :func:`~dit_sparse.layout.spread_rows_on`. The paper looks at all.
        staleness: Standard deviation of log row mass above which a cached LSE is considered stale
            and is recomputed; a cached LSE that drifted by one constant per query block changes no
            ranking, an uneven drift does. None never recomputes, as in the paper.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2502.21079, sections 4.2-4.4, algorithms 1 and 2 (which print ``Log`` for the
    ``exp`` that the paper's own safe-softmax equation requires).
    """

    name = "adaspa"
    splits_heads = True

    sparsity: float = 0.8
    search: tuple[int | float, ...] = (0.2, 0.6)
    block: Block | Literal["auto"] = "auto"
    tile: tuple[int, int, int] | None = (4, 4, 4)
    head_adaptive: bool = True
    lse_cache: bool = True
    row_stride: int | tuple[int, int] = (2, 4)
    staleness: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise ValueError(f"sparsity must be a number in [0, 1), got {self.sparsity!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                "sparsity is the share of blocks skipped and must be in [0, 1), got "
                f"{self.sparsity}; sparsity=0.8 keeps 20 %"
            )
        self._check_block()
        check_box("tile", self.tile)
        strides = self._strides
        if len(strides) != 2 or any(type(n) is not int or n not in ROW_STRIDES for n in strides):
            raise ValueError(
                f"row_stride must be one of {ROW_STRIDES}, or (first, later) of these, got "
                f"{self.row_stride!r}; row_stride=1 looks at all rows"
            )
        if self.staleness is not None and not self.staleness > 0:
            raise ValueError(f"staleness must be positive or None, got {self.staleness!r}")
        Schedule(self.search)

    @classmethod
    def exact(cls) -> AdaSpa:
        return cls(sparsity=0.0, search=(0,))

    @cached_property
    def _schedule(self) -> Schedule:
        return Schedule(self.search)

    @property
    def _strides(self) -> tuple[int, int]:
        """Of how many rows the first search looks at one, and later ones."""
        stride = self.row_stride
        return stride if isinstance(stride, tuple) else (stride, stride)

    def _attend(self, call: Call) -> Tensor:
        phase = self._schedule.phase(call.step, call.memory.get("found"))
        if phase is Phase.DENSE:
            call.record(phase)
            return call.dense()
        order = call.tile_order(self.tile)
        moved = call.ordered(order)
        first, later = self._strides
        if phase is Phase.SEARCH:
            # The output of this step is the model's own; it brings the LSE along.
            dense = call.dense_with_lse()
            lse = dense.lse if order is None else order.apply(dense.lse, dim=2)
            self._search(moved, first, _at(lse, self._rows(moved, first)))
            if self.lse_cache:
                call.memory["lse"] = _at(lse, self._rows(moved, later))
            call.record(phase)
            return dense.out
        if phase is Phase.REFRESH:
            self._search(moved, later, call.memory.get("lse"))
        mask = call.memory["mask"]
        call.record(phase, mask)
        out = moved.attention(mask).out
        return out if order is None else order.undo(out)

    def _rows(self, call: Call, stride: int) -> Tensor | None:
        """Places of the rows that a search looks at; None for all."""
        return None if stride == 1 else call.spread_rows(self.tile, stride)

    def _search(self, call: Call, stride: int, lse: Tensor | None) -> None:
        """Finds the mask by one row of every ``stride``.

        Args:
            call: Tokens in tile order, text last.
            stride: Divides the query blocks, so that each has its share of the rows.
            lse: Normalisers of these rows, of this step in the first search and of an earlier one
                later; None if they are not kept.
        """
        stop = call.search_watch.start(call.q.device)
        memory = call.memory
        rows, columns = self._sides
        block = (rows // stride, columns)
        looking = call.part(self._rows(call, stride))
        cached = lse is not None and "found" in memory
        if lse is None:
            lse = looking.row_lse()
        mass = looking.block_mass(lse, block)
        if cached:
            drift = memory["drift"] = row_mass_drift(mass, looking.q.shape[1], block[0])
            # The one read-back, only where the user asked for the guard, once per refresh.
            if self.staleness is not None:
                worst = call.heads.all_heads(drift).max()
                if bool(worst > self.staleness):
                    memory["lse"] = looking.row_lse()
                    mass = looking.block_mass(memory["lse"], block)
        memory["mask"], memory["found"] = self.select(call, mass), call.step.index
        stop()

    def select(self, call: Call, mass: Tensor) -> PackedMask:
        """The blocks to keep: by mass in every row, by recall over the heads.

        Args:
            call: Tokens in tile order, text last.
            mass: Their block mass ``[batch, heads, q_blocks, kv_blocks]``, by all rows or by an
                equal share of every block's.
        """
        rows, video = (video_blocks(call.layout, side) for side in self._sides)
        budget = torch.full(mass.shape[:2], self.sparsity, device=mass.device)
        if self.head_adaptive:
            even = call.top_blocks(mass, kept_blocks(budget, video), self._sides)
            total = mass[..., :rows, :video].sum((-1, -2))
            recall = even.kept_mass.sum(-1) / total.clamp_min(1e-30)
            levels = head_levels(call.heads.all_heads(recall), self.sparsity)
            budget = call.heads.own_heads(levels)
        lowest = _outer_levels(self.sparsity)[1] if self.head_adaptive else self.sparsity
        most = int(kept_blocks(torch.tensor(lowest), video))
        return call.top_blocks(mass, kept_blocks(budget, video), self._sides, most).mask


def row_mass_drift(mass: Tensor, tokens: int, block: int) -> Tensor:
    """Spread of log row mass over query blocks, ``[batch, heads]`` fp32: 0 for a fresh LSE.

    With a fresh LSE every row of W sums to its number of tokens; with a cached one to the sum of
    ``exp(LSE_true - LSE_cached)``. A common factor changes no ranking, hence the spread.

    Args:
        mass: Block mass ``[batch, heads, q_blocks, kv_blocks]``.
        tokens: Query rows that the mass is of.
        block: How many of them are in a query block.
    """
    rows = block_sizes(tokens, block, mass.device)
    return (mass.sum(-1) / rows).log().std(-1, unbiased=False)


def _outer_levels(sparsity: float) -> tuple[float, float]:
    """The levels above and below ``sparsity``."""
    high, low = ((1 + sparsity) / 2, (3 * sparsity - 1) / 2)
    return (2 * sparsity, 0.0) if low < 0 else (high, low)


def head_levels(recall: Tensor, sparsity: float) -> Tensor:
    """Sparsity of every head by its recall, ``[batch, heads]`` fp32; the mean is ``sparsity``.

    Args:
        recall: Share of attention mass kept at the base sparsity, ``[batch, heads]``.
        sparsity: The base level s.
    """
    heads = recall.shape[-1]
    high, low = _outer_levels(sparsity)
    easy = (recall > EASY_RECALL).sum(-1, keepdim=True).clamp(max=heads // 2)
    # Rank 0 is the highest recall; equal recalls keep head order, so ties are deterministic.
    order = recall.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    levels = torch.full(recall.shape, float(sparsity), device=recall.device)
    levels = torch.where(rank < easy, high, levels)
    return torch.where(rank >= heads - easy, low, levels)


def kept_blocks(sparsity: Tensor, blocks: int) -> Tensor:
    """Key blocks that a query block keeps: ``round((1 - s) N)``, never 0; int64, as ``sparsity``.

    Args:
        sparsity: ``[batch, heads]``.
        blocks: N.
    """
    return ((1 - sparsity) * blocks).round().clamp(min=1).long()


def _at(lse: Tensor, rows: Tensor | None) -> Tensor:
    return lse if rows is None else lse.index_select(-1, rows)
