"""Compensated delta: skipped blocks leave their means, and what means miss is remembered.

This project's own method. Three ideas that are each known, and that are worth more together:

1. Tokens stand in 3-D tiles, so that a block is a box in space and time and its mean says much.
2. A skipped block is not dropped: its mean takes part in the softmax (zeroth order), and one matrix
   per head adds what keys and values vary together inside blocks (first order); see
   :class:`~dit_sparse.kernels.summary.BlockSummary`.
3. What is still missing moves slowly between denoising steps. Where attention was computed densely,
   the residual ``R = O_dense - O_sparse`` of that moment is kept and added from then on.

With S_t the compensated sparse output at step t, rows refreshed last at t0 give ::

    O_t = S_t + R_t0 = O_t0 + (S_t - S_t0),

that is, the dense output of t0 moved by the change that sparse attention sees. Attention with
frozen inputs is therefore exact at any density.

The refresh rotates: at each step one row of blocks in ``period`` is computed densely, another at
the next step, so that no step after the warm-up is dense and the cost of steps is even. The dense
rows bring their log-sum-exp along, and with it the exact mass of every block, from which the rows'
masks are chosen anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.ops import Attended
from dit_sparse.layout import Ordering
from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.residual import ResidualMethod
from dit_sparse.methods.residual_values import Residual
from dit_sparse.methods.rotation import Part, Unit, part_of_turn, turns_since
from dit_sparse.schedule import Phase, Step

Summary = Literal["drop", "centroid", "first_order"]
Selection = Literal["mass", "pooled"]


@dataclass(frozen=True)
class CompensatedDelta(ResidualMethod):
    """Block-sparse attention with summaries of skipped blocks and a remembered residual.

    How residuals are kept is said by the settings of
    :class:`~dit_sparse.methods.residual.ResidualMethod`; layers that keep none run without.

    Attributes:
        density: Share of video key blocks that a query block computes exactly, in [0, 1]. With 0
            and no summary nothing is computed between refreshes: attention outputs are reused.
        period: Steps in which every row is refreshed once.
        refresh: What a step refreshes: ``"rows"``, one query block in ``period``; ``"heads"``, one
            head in ``period``; ``"all"``, everything at every ``period``-th step and nothing
            between; ``"never"``, nothing after the warm-up.
        warmup: Dense steps at the start, at least 1: a number, or a share of all steps (of the
            first ones' noise range where nothing tells how many steps there are).
        summary: What skipped blocks contribute: nothing, their means, or means and slope.
        delta: Whether the residual of the last refresh is added.
        fade: Whether an ageing residual is added in part: by how much it still explains where it is
            replaced, see :func:`log_fade`. If not, it is added whole.
        extrapolate: Whether the residual is continued linearly from its last two refreshes; keeps
            twice as much, in native precision on the device.
        selection: How a refresh ranks key blocks: by exact attention mass, or by the scores of
            pooled queries and keys.
        block: Tokens in a block, 64 or 128.
        tile: (frames, height, width) of the boxes of tokens, or None for raster order.

    Raises:
        ValueError: On a value outside these ranges.
    """

    name = "compensated_delta"
    splits_heads = True

    density: float = 0.1
    period: int = 8
    refresh: Unit = "rows"
    warmup: int | float = 0.2
    summary: Summary = "first_order"
    delta: bool = True
    fade: bool = False
    extrapolate: bool = False
    selection: Selection = "mass"
    block: int = 64
    tile: tuple[int, int, int] | None = (4, 4, 4)
    # A default must not refuse: the residual takes what room there is.
    adapt: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extrapolate and (self.precision != "native" or self.offload or self.adapt):
            raise ValueError(
                "extrapolate needs residuals of native precision on the device, got "
                f"precision={self.precision!r}, offload={self.offload}, adapt={self.adapt}"
            )
        if isinstance(self.density, bool) or not 0 <= self.density <= 1:
            raise ValueError(
                f"density is the share of blocks kept and must be in [0, 1], got {self.density!r}"
            )
        if not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period must be a number of steps, 1 or more, got {self.period!r}")
        for name, kind in (("refresh", Unit), ("summary", Summary), ("selection", Selection)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                )
        share = isinstance(self.warmup, float)
        if isinstance(self.warmup, bool) or not (
            0 <= self.warmup <= 1 if share else self.warmup >= 1
        ):
            raise ValueError(
                "warmup must be a number of steps, 1 or more, or a share in [0, 1], got "
                f"{self.warmup!r}"
            )
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")

    @classmethod
    def exact(cls) -> CompensatedDelta:
        return cls(density=1.0, warmup=1)

    def attend(self, call: Call) -> Tensor:
        memory = call.memory
        # Asked in every step, so that residuals that cannot be kept are refused in the first.
        delta = self.delta and self.residual_store(call).admit(call)
        if "turn" not in memory and self._is_warmup(call.step):
            call.record(Phase.DENSE)
            return call.dense()
        turn = memory["turn"] = memory["turn"] + 1 if "turn" in memory else 0
        order = call.tile_order(self.tile)
        moved = call.ordered(order)
        part = part_of_turn(moved, self.refresh, self.period, turn, self.block)
        if part is not None and part.call is moved:
            # A whole refresh returns the model's own output and keeps what explains it.
            dense = call.dense_with_lse()
            stop = call.search_watch.start(call.q.device)
            in_order = dense if order is None else _reordered(dense, order)
            self._refresh(moved, part, in_order, delta, turn)
            stop()
            call.record(Phase.SEARCH)
            return dense.out
        if part is None:
            out = self._sparse(moved)
        else:
            stop = call.search_watch.start(call.q.device)
            dense_part = part.call.attention() if delta else None
            out = self._refresh(moved, part, dense_part, delta, turn)
            stop()
        if delta:
            out = self._corrected(moved, out, turn)
        self._record(call, moved, delta)
        return out if order is None else order.undo(out)

    def residuals_kept(self) -> int:
        return 2 if self.extrapolate else 1

    def _is_warmup(self, step: Step) -> bool:
        """Whether ``step`` is one of the warm-up but the last, which is refreshed whole."""
        if isinstance(self.warmup, int):
            return step.index < self.warmup - 1
        if step.total is None:
            return step.progress < self.warmup
        return step.index < max(1, round(self.warmup * step.total)) - 1

    def _record(self, call: Call, moved: Call, delta: bool) -> None:
        mask: PackedMask = call.memory["mask"]
        call.record(Phase.SPARSE, mask, summary=self.summary != "drop")
        if delta and self.refresh in ("rows", "heads"):
            # Over a period every video query meets every key once more.
            share = moved.layout.video / moved.layout.tokens
            call.head_density = mask.head_density + share / self.period

    def _sparse(self, call: Call) -> Tensor:
        """The compensated sparse output of all queries; zero where nothing is computed."""
        if self.density == 0 and self.summary == "drop" and not call.layout.text:
            return torch.zeros_like(call.q)
        summary = None
        if self.summary != "drop":
            summary = call.summarize(self.block, first_order=self.summary == "first_order")
        return call.attention(call.memory["mask"], summary).out

    def _refresh(
        self, call: Call, part: Part, dense: Attended | None, delta: bool, turn: int
    ) -> Tensor:
        """Chooses the masks of a part anew and remembers its residual.

        Args:
            call: The whole call.
            part: What to refresh.
            dense: Dense attention of the part, where there is a residual or the model ran it.
            delta: Whether this layer keeps a residual.
            turn: Number of this step since the warm-up.

        Returns:
            The sparse output of the whole call under the new masks.
        """
        memory = call.memory
        chosen = self._choose(part.call, None if dense is None else dense.lse)
        if part.call is call:
            memory["mask"] = chosen
        else:
            part.put_bits(memory["mask"].bits, chosen.bits)
        out = self._sparse(call)
        if dense is None or not delta:
            return out
        store = self.residual_store(call)
        precision = store.options.precision
        fresh = Residual.between(dense.out, out[part.index], precision=precision)
        if "residual0" not in memory:
            store.put(call, fresh)
            return out
        kept = store.get(call)
        if self.fade:
            age = min(turn, self.period)
            self._calibrate(call, part, kept.read(part.index), fresh.read((slice(None),)), age)
        if self.extrapolate:
            if "residual1" not in memory:
                store.put(call, Residual(torch.zeros_like(kept.values)), slot=1)
            change = (fresh.values - kept.values[part.index]) / self.period
            store.get(call, slot=1).replace(part.index, Residual(change))
        kept.replace(part.index, fresh)
        store.put(call, kept)
        return out

    def _calibrate(self, call: Call, part: Part, old: Tensor, new: Tensor, age: int) -> None:
        """Learns how residuals fade from one that is replaced, ``age`` steps old."""
        measured = log_fade(old, new) / age
        fade = call.memory.get("fade")
        if fade is None:
            call.memory["fade"] = fade = measured.new_zeros(1, 1, call.q.shape[2], 1)
            fade[:, :, part.heads] = measured
        else:
            # Halfway to the new measurement: each sees a part of the rows only.
            fade[:, :, part.heads] += (measured - fade[:, :, part.heads]) / 2

    def _choose(self, call: Call, lse: Tensor | None) -> PackedMask:
        """The key blocks that the queries of ``call`` keep, every row equally many."""
        video = video_blocks(call.layout, self.block)
        count = max(1, round(self.density * video)) if self.density else 0
        if self.selection == "mass":
            scores = call.block_mass(call.row_lse() if lse is None else lse, self.block)
        else:
            scores = pooled_scores(call, self.block)
        kept = torch.full((1, 1), count, device=call.q.device)
        return call.top_blocks(scores, kept, self.block, count).mask

    def _corrected(self, call: Call, out: Tensor, turn: int) -> Tensor:
        """``out`` with what the last refresh of every query and head left to add."""
        store = self.residual_store(call)
        residual, weight = store.get(call), None
        if "fade" in call.memory or "residual1" in call.memory:
            age = turns_since(call, self.refresh, self.period, turn, self.block)
            if "residual1" in call.memory:
                trend = store.get(call, slot=1).values
                residual = Residual(residual.values + trend * age.to(trend.dtype))
            if "fade" in call.memory:
                weight = (age * call.memory["fade"]).exp().expand(1, call.q.shape[1], -1, -1)
        out = residual.add_to(out, weight=weight)
        if call.step.total is not None and call.step.index >= call.step.total - 1:
            # Nothing follows in this generation but the decoder, which needs the room.
            for slot in range(self.residuals_kept()):
                store.drop(call, slot)
        return out


def log_fade(old: Tensor, new: Tensor) -> Tensor:
    """Logarithm of gamma, the share of a residual that still holds, ``[1, 1, heads, 1]``.

    ``gamma = <new, old> / <old, old>`` is the factor with which the old residual explains most of
    the new one, per head and within [0.001, 1]; assumed to fall geometrically with age.

    Args:
        old: The residual kept so far, ``[batch, tokens, heads, dim]``.
        new: The one that replaces it.
    """
    over = (0, 1, 3)
    share = (new * old).sum(over) / (old * old).sum(over).clamp_min(1e-30)
    return share.clamp(1e-3, 1.0).log().view(1, 1, -1, 1)


def _reordered(dense: Attended, order: Ordering) -> Attended:
    return Attended(order.apply(dense.out), order.apply(dense.lse, dim=2))


def pooled_scores(call: Call, block: int) -> Tensor:
    """Softmax over key blocks of the scores of mean queries and mean keys.

    ``P[p, j] = softmax_j(s qbar_p.kbar_j + log n_j)``, fp32
    ``[batch, heads, q_blocks, kv_blocks]``; blocks with text or without a valid key get 0.

    Source: the block-sparse estimate of MInference (arXiv 2407.02490) and PISA (arXiv 2602.01077).
    """
    summary = call.summarize(block)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    means = block_means(call.q, block)
    scores = torch.einsum("bphd,bjhd->bhpj", means, summary.key_mean.float()) * scale
    return (scores + summary.count.log()[:, None, None]).softmax(-1).nan_to_num()


def block_means(x: Tensor, block: int) -> Tensor:
    """Mean of each block of tokens, ``[batch, blocks, heads, dim]`` fp32."""
    batch, tokens, heads, dim = x.shape
    whole = tokens // block
    mean = x[:, : whole * block].view(batch, whole, block, heads, dim).mean(2, dtype=torch.float32)
    if whole * block == tokens:
        return mean
    return torch.cat([mean, x[:, whole * block :].float().mean(1, keepdim=True)], 1)
