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
masks are chosen anew. Where few steps follow the warm-up, nothing is refreshed and more blocks are
kept instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.ops import Attended
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.layout import Ordering
from dit_sparse.mask import Block
from dit_sparse.methods.auto_block import AutoBlock
from dit_sparse.methods.base import Call, check_box, video_blocks
from dit_sparse.methods.block_scores import error_scores, pooled_softmax
from dit_sparse.methods.drift import Later, drift, keep_reference
from dit_sparse.methods.head_budget import compensation_size, level_counts, spread
from dit_sparse.methods.residual import ResidualMethod
from dit_sparse.methods.residual_values import Residual
from dit_sparse.methods.rotation import Part, Unit, part_of_turn, turns_since
from dit_sparse.schedule import Phase, Step

Refresh = Literal["auto", "rows", "heads", "all", "never"]
Summary = Literal["drop", "centroid", "first_order"]
Selection = Literal["mass", "pooled", "error"]
# Turns of a period that is given as a distance of noise levels.
TURNS = 8
# Noise levels beyond which the log of signal to noise says nothing any more.
_CLEAREST = 0.01


@dataclass(frozen=True)
class CompensatedDelta(AutoBlock, ResidualMethod):
    """Block-sparse attention with summaries of skipped blocks and a remembered residual.

    How residuals are kept is said by the settings of
    :class:`~dit_sparse.methods.residual.ResidualMethod`; layers that keep none run without.

    Attributes:
        density: Share of video key blocks that a query block computes exactly, in [0, 1]. With 0
            and no summary nothing is computed between refreshes: attention outputs are reused.
        period: In what everything is refreshed once: a number of steps (int), or a distance (float)
            on the scale of :func:`log_snr`, along which outputs move evenly whatever the steps.
        refresh: What a step refreshes: ``"rows"``, one query block in ``period``; ``"heads"``, one
            head in ``period``; ``"all"``, everything at every ``period``-th step and nothing
            between; ``"never"``, nothing after the warm-up. ``"auto"`` is ``"rows"`` where at least
            two periods follow the warm-up, and else ``"never"`` with ``1 / period`` more density,
            which costs the same.
        warmup: Dense steps at the start, at least 1: a number, or a share of all steps (of the
            first ones' noise range where nothing tells how many steps there are).
        summary: What skipped blocks contribute: nothing, their means, or means and slope.
        delta: Whether the residual of the last refresh is added.
        fade: Whether an ageing residual is added in part: by how much it still explains where it is
            replaced, see :func:`log_fade`. If not, it is added whole.
        extrapolate: Whether the residual is continued linearly from its last two refreshes; keeps
            twice as much, in native precision on the device.
        selection: How a refresh ranks key blocks: by exact attention mass, by the scores of
            pooled queries and keys, or by what the means of blocks get wrong.
        mask_period: Refreshes of a row until its mask is chosen anew, too. Masks age slowly, and
            choosing one costs half of what a dense row costs.
        head_adaptive: Whether heads get one of three densities, by the size of what summaries add;
            the mean is ``density``. Measured where everything is refreshed.
        theta: Drift of the sparse output since the last refresh above which a layer is refreshed
            whole at its next step, see :func:`~dit_sparse.methods.drift.drift`; None never. Each
            call then reads one number back that the layer's last call computed.
        block: Tokens in a query and a key block, 64 or 128; a pair if they differ. ``"auto"`` is
            64, but (128, 64) where kernels are faster with it, see
            :func:`~dit_sparse.kernels.blocks.fastest_block`.
        tile: (frames, height, width) of the boxes of tokens, or None for raster order.

    Raises:
        ValueError: On a value outside these ranges.
    """

    name = "compensated_delta"
    splits_heads = True

    density: float = 0.1
    period: int | float = 8
    refresh: Refresh = "auto"
    warmup: int | float = 0.2
    summary: Summary = "first_order"
    delta: bool = True
    fade: bool = False
    extrapolate: bool = False
    selection: Selection = "mass"
    mask_period: int = 4
    head_adaptive: bool = False
    theta: float | None = None
    block: Block | Literal["auto"] = "auto"
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
        for name in ("period", "mask_period"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        if not isinstance(self.mask_period, int):
            raise ValueError(
                f"mask_period must be a number of refreshes, 1 or more, got {self.mask_period!r}"
            )
        if isinstance(self.period, float) and (self.fade or self.extrapolate):
            raise ValueError(
                "fade and extrapolate count the age of residuals in steps and need a period in "
                f"steps (int), got period={self.period!r}"
            )
        for name, kind in (("refresh", Refresh), ("summary", Summary), ("selection", Selection)):
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
        if self.theta is not None and (isinstance(self.theta, bool) or not self.theta > 0):
            raise ValueError(f"theta must be a number above 0 or None, got {self.theta!r}")
        self._check_block()
        check_box("tile", self.tile)

    @classmethod
    def exact(cls) -> CompensatedDelta:
        return cls(density=1.0, warmup=1)

    def _attend(self, call: Call) -> Tensor:
        # Asked in every step, so that residuals that cannot be kept are refused in the first.
        delta = self.delta and self.residual_store(call).admit(call)
        if "turn" not in call.memory and self._is_warmup(call.step):
            call.record(Phase.DENSE)
            return call.dense()
        turns = self._take_turns(call)
        turn = call.memory["turn"]
        order = call.tile_order(self.tile)
        moved = call.ordered(order)
        part = part_of_turn(moved, self._unit(call.step), self._turns, turn, self._rows, turns)
        if part is not None and part.call is moved:
            # A whole refresh returns the model's own output and keeps what explains it.
            dense = call.dense_with_lse()
            stop = call.search_watch.start(call.q.device)
            in_order = dense if order is None else _reordered(dense, order)
            exact = moved.in_model_dtype()
            self._refresh(exact, replace(part, call=exact), in_order, delta)
            stop()
            call.record(Phase.SEARCH)
            return dense.out
        if part is None or not (delta or self._chooses(turn)):
            out = self._sparse(moved, self._summarize(moved))
        else:
            stop = call.search_watch.start(call.q.device)
            out = self._refresh(moved, part, part.call.attention() if delta else None, delta)
            stop()
        if self.theta is not None:
            call.memory["drift"] = Later.begin(drift(moved, out, self._rows))
        call.record(Phase.SPARSE, call.memory["mask"])
        call.head_density = self._density(moved, delta, turns)
        if delta:
            return self._corrected(moved, out, order)
        return out if order is None else order.undo(out)

    def residuals_kept(self) -> int:
        return 2 if self.extrapolate else 1

    @property
    def _rows(self) -> int:
        """Tokens in a query block."""
        return self._sides[0]

    @property
    def _columns(self) -> int:
        """Tokens in a key block."""
        return self._sides[1]

    @property
    def _turns(self) -> int:
        """Turns of a period."""
        return self.period if isinstance(self.period, int) else TURNS

    def _warm_steps(self, total: int) -> int:
        """Dense steps at the start of ``total``, the last of which is refreshed whole."""
        if isinstance(self.warmup, int):
            return self.warmup
        return max(1, round(self.warmup * total))

    def _is_warmup(self, step: Step) -> bool:
        """Whether ``step`` is one of the warm-up but the last, which is refreshed whole."""
        if isinstance(self.warmup, float) and step.total is None:
            return step.progress < self.warmup
        return step.index < self._warm_steps(step.total or 0) - 1

    def _unit(self, step: Step) -> Unit:
        """What is refreshed in turn."""
        if self.refresh != "auto":
            return self.refresh
        if isinstance(self.period, float) or step.total is None:
            return "rows"
        following = step.total - self._warm_steps(step.total)
        return "rows" if following >= 2 * self.period else "never"

    def _take_turns(self, call: Call) -> int:
        """Moves the memory's turn on and says by how many; turn 0 refreshes everything.

        Turns are those of calls that run: a refresh that falls into a step which a step cache skips
        comes with the next call.
        """
        memory = call.memory
        drifted = self.theta is not None and "drift" in memory and (
            memory.pop("drift").read() > self.theta
        )  # fmt: skip
        if "turn" not in memory or drifted:
            memory["turn"] = 0
            if isinstance(self.period, float):
                memory["start"] = log_snr(call.step.progress)
            return 1
        before = memory["turn"]
        if isinstance(self.period, int):
            memory["turn"] = before + 1
        else:
            # The noise level rises nowhere, but rounding may say so.
            way = max(0.0, log_snr(call.step.progress) - memory["start"])
            memory["turn"] = max(before, int(way / self.period * TURNS))
        return memory["turn"] - before

    def _chooses(self, turn: int) -> bool:
        """Whether the refresh of ``turn`` chooses masks."""
        return -(-turn // self._turns) % self.mask_period == 0

    def _summarize(self, call: Call) -> BlockSummary | None:
        if self.summary == "drop":
            return None
        return call.summarize(self._columns, first_order=self.summary == "first_order")

    def _sparse(self, call: Call, summary: BlockSummary | None) -> Tensor:
        """The compensated sparse output of all queries; zero where nothing is computed."""
        if self.density == 0 and summary is None and not call.layout.text:
            return torch.zeros_like(call.q)
        return call.attention(call.memory["mask"], summary).out

    def _refresh(self, call: Call, part: Part, dense: Attended | None, delta: bool) -> Tensor:
        """Chooses the masks of a part anew, if that is due, and remembers its residual.

        Args:
            call: The whole call.
            part: What to refresh.
            dense: Dense attention of the part, where there is a residual or the model ran it.
            delta: Whether this layer keeps a residual.

        Returns:
            The sparse output of the whole call under the new masks.
        """
        memory = call.memory
        summary = self._summarize(call)
        if self._chooses(memory["turn"]):
            self._choose(call, part, summary, None if dense is None else dense.lse)
        out = self._sparse(call, summary)
        if self.theta is not None:
            keep_reference(call, part, out, self._rows)
        if dense is not None and delta:
            self._remember(call, part, dense.out, out)
        return out

    def _choose(
        self, call: Call, part: Part, summary: BlockSummary | None, lse: Tensor | None
    ) -> None:
        """Chooses the key blocks that the queries of a part keep."""
        memory = call.memory
        scores = self._scores(part, summary, lse)
        if part.call is not call:
            count = memory["count"]
            heads = count if count.shape[1] == 1 else count[:, part.heads]
            chosen = part.call.top_blocks(scores, heads, self._sides, memory["longest"]).mask
            part.put_bits(memory["mask"].bits, chosen.bits)
            return
        video = video_blocks(call.layout, self._columns)
        density = self.density
        if self.refresh == "auto" and self._unit(call.step) == "never":
            density = min(1.0, density + 1 / self._turns)
        even = max(1, round(density * video)) if density else 0
        memory["count"] = torch.full((1, 1), even, device=call.q.device)
        memory["longest"] = even
        memory["mask"] = call.top_blocks(scores, memory["count"], self._sides, even).mask
        if self.head_adaptive and summary is not None and (wider := spread(even, video)):
            size = compensation_size(self._sparse(call, summary), self._sparse(call, None))
            levels = level_counts(call.heads.all_heads(size), even, video)
            memory["count"] = call.heads.own_heads(levels)
            memory["longest"] = even + wider
            memory["mask"] = call.top_blocks(
                scores, memory["count"], self._sides, memory["longest"]
            ).mask

    def _scores(self, part: Part, summary: BlockSummary | None, lse: Tensor | None) -> Tensor:
        """How the queries of ``part`` rank key blocks, ``[batch, heads, q_blocks, kv_blocks]``."""
        call = part.call
        if self.selection == "mass":
            return call.block_mass(call.row_lse() if lse is None else lse, self._sides)
        if summary is None or isinstance(part.heads, Tensor) or part.heads != slice(None):
            summary = call.summarize(self._columns)
        score = pooled_softmax if self.selection == "pooled" else error_scores
        return score(call, summary, self._sides)

    def _density(self, call: Call, delta: bool, turns: int) -> Tensor:
        """Density of this step, dense parts included, ``[batch | 1, heads | 1]``."""
        density = call.memory["mask"].head_density
        if not delta or self._unit(call.step) not in ("rows", "heads"):
            return density
        # In a period every video query meets every key once more.
        share = call.layout.video / call.layout.tokens / self._turns
        if isinstance(self.period, float):
            return density + share * turns
        # One tensor for all steps of one mask.
        known = call.memory.get("density")
        if known is None or known[0] is not density:
            known = call.memory["density"] = (density, density + share)
        return known[1]

    def _remember(self, call: Call, part: Part, dense: Tensor, sparse: Tensor) -> None:
        """Replaces the residual of a part."""
        memory = call.memory
        store = self.residual_store(call)
        precision = store.options.precision
        if "residual0" not in memory:
            store.put(call, Residual.between(dense, sparse, precision=precision, impl=call.impl))
            return
        kept = store.get(call)
        if self.fade or self.extrapolate:
            fresh = Residual.between(dense, sparse[part.index], precision=precision)
            if self.fade:
                age = max(1, min(memory["turn"], self._turns))
                old, new = kept.read(part.index), fresh.read((slice(None),))
                self._calibrate(call, part, old, new, age)
            if self.extrapolate:
                if "residual1" not in memory:
                    store.put(call, Residual(torch.zeros_like(kept.values)), slot=1)
                change = (fresh.values - kept.values[part.index]) / self.period
                store.get(call, slot=1).replace(part.index, Residual(change))
        kept.update(dense, sparse, part.index, impl=call.impl)
        store.put(call, kept)

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

    def _corrected(self, call: Call, out: Tensor, order: Ordering | None) -> Tensor:
        """``out`` with what the last refresh left to add, in the model's order."""
        store = self.residual_store(call)
        residual, weight = store.get(call), None
        if "fade" in call.memory or "residual1" in call.memory:
            unit, turn = self._unit(call.step), call.memory["turn"]
            age = turns_since(call, unit, self._turns, turn, self._rows)
            if "residual1" in call.memory:
                trend = store.get(call, slot=1).values
                residual = Residual(residual.values + trend * age.to(trend.dtype))
            if "fade" in call.memory:
                weight = (age * call.memory["fade"]).exp().expand(1, call.q.shape[1], -1, -1)
        out = residual.add_to(out, weight=weight, order=order, impl=call.impl)
        if call.step.total is not None and call.step.index >= call.step.total - 1:
            # Nothing follows in this generation but the decoder, which needs the room.
            for slot in range(self.residuals_kept()):
                store.drop(call, slot)
        return out


def log_snr(progress: float) -> float:
    """Log of signal to noise, ``ln((1 - sigma) / sigma)``, with sigma the noise level.

    Attention outputs of the embedded model move by about a third of this distance, relative to
    their size, at every noise level and step size; along sigma itself or steps they do not.

    Args:
        progress: ``1 - sigma``; held within [0.01, 0.99].
    """
    signal = min(max(progress, _CLEAREST), 1 - _CLEAREST)
    return math.log(signal / (1 - signal))


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
