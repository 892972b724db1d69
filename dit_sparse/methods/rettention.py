"""Re-ttention: sparse attention with the softmax statistics and the residual of a dense step.

Source: Re-ttention, arXiv 2505.22918, and its code (github.com/cccrrrccc/Re-ttention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.mask import PackedMask
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call, check_box
from dit_sparse.methods.residual import ResidualMethod, ResidualStore
from dit_sparse.methods.residual_values import Residual
from dit_sparse.methods.windows import nearest_window, raster_window
from dit_sparse.schedule import PeriodicSchedule, Phase

MASKS = ("window", "window3d", "adaspa")


@dataclass(frozen=True)
class Rettention(ResidualMethod):
    """Sparse attention, rescaled and completed by what a dense step shortly before has shown.

    A dense step also computes sparse attention and keeps, with ``S_i`` the kept keys of row i,

    * ``rho_i = exp(LSE_sparse,i - LSE_dense,i)``, the share of the row's softmax that falls on S_i;
    * ``R = O_dense - rho * O_sparse``, the contribution of the keys that were dropped.

    The steps after it return ``rho' * O_sparse + R``, with ``rho' = min(rho + ramp * j, 1)`` in
    the j-th of them, counted from 0.

    The mask stays the same from one dense step to the next; rho and R belong to it.

    Attributes:
        sparsity: Share of the video blocks that a row skips, in [0, 1). With ``mask="window"`` the
            share of a frame outside the band; whole blocks are computed, so that more is kept.
        mask: ``"window"``: the paper's band over the raster order within a frame, see
            :func:`~dit_sparse.methods.windows.raster_window`. ``"window3d"``: the blocks nearest in
            space and time, see :func:`~dit_sparse.methods.windows.nearest_window`. ``"adaspa"``:
            those of largest attention mass, searched in every dense step that keeps statistics, see
            :class:`~dit_sparse.methods.adaspa.AdaSpa`.
        warmup: Dense steps at the beginning: a count or a share of all steps.
        period: From one dense step to the next after the warm-up.
        ramp: Growth of rho from step to step (lambda in the paper).
        clamp: Whether rho stays at most 1, as the paper's text has it. Its code lets rho grow
            without bound, which scales even rows that drop nothing.
        block: Tokens in a query and a key block, 64 or 128.
        tile: Order of the video tokens for ``"window3d"`` and ``"adaspa"``: (frames, height, width)
            of a tile that becomes one run, or None for raster order. ``"window"`` is in raster
            order.
        head_adaptive: Whether ``"adaspa"`` gives heads one of three sparsities by their recall.
        correct: Whether rho and R are used. False drops what the mask skips, at the same steps: the
            baseline that shows what they are worth.

    Layers that keep no residual (``layers``) stay dense.

    Raises:
        ValueError: On a value outside these ranges.

    Source: arXiv 2505.22918. It takes 3.125 % of a frame, period 5, ramp 0.04, and a warm-up of 15
    of 50 steps for CogVideoX, 10 of 50 for Hunyuan-DiT and 5 of 20 for PixArt.
    """

    name = "rettention"
    splits_heads = True
    row_statistics: ClassVar[int] = 1

    sparsity: float = 0.96875
    mask: str = "window"
    warmup: int | float = 0.3
    period: int = 5
    ramp: float = 0.04
    clamp: bool = True
    block: int = 64
    tile: tuple[int, int, int] | None = (4, 4, 4)
    head_adaptive: bool = True
    correct: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparsity", "ramp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {MASKS}, got {self.mask!r}")
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")
        check_box("tile", self.tile)
        PeriodicSchedule(self.warmup, self.period)

    @classmethod
    def exact(cls) -> Rettention:
        return cls(sparsity=0.0, warmup=0, period=2)

    def attend(self, call: Call) -> Tensor:
        store = self.residual_store(call)
        phase = PeriodicSchedule(self.warmup, self.period).phase(call.step, call.memory.get("kept"))
        if not self._admits(store, call):
            phase = Phase.DENSE
        if phase is Phase.DENSE:
            call.record(phase)
            out = call.dense()
        elif phase is Phase.SEARCH:
            call.record(phase)
            out = self._keep(store, call)
        else:
            call.record(phase, call.memory["mask"])
            out = self._reuse(store, call)
        if call.step.total is not None and call.step.index >= call.step.total - 1:
            # Nothing follows in this generation but the decoder, which needs the room.
            store.drop(call)
        return out

    def _admits(self, store: ResidualStore, call: Call) -> bool:
        if self.correct:
            return store.admit(call)
        return call.layer in self.residual_options.held_layers(call.layers, call.dense_layers)

    def _keep(self, store: ResidualStore, call: Call) -> Tensor:
        """The model's own output; keeps the mask and, with it, rho and the residual."""
        dense = call.dense_with_lse()
        stop = call.search_watch.start(call.q.device)
        order = call.tile_order(self._tile)
        moved = call.ordered(order)
        mask = self._select(moved, dense.lse if order is None else order.apply(dense.lse, dim=2))
        if self.correct:
            sparse = moved.in_model_dtype().attention(mask)
            out, lse = sparse.out, sparse.lse
            if order is not None:
                out, lse = order.undo(out), order.undo(lse, dim=2)
            rho = softmax_share(lse, dense.lse)
            if self.clamp:
                # Two kernels round differently: a row that drops nothing must not exceed 1.
                rho = rho.clamp(max=1)
            call.memory["rho"] = rho
            precision = store.options.precision
            store.put(call, Residual.between(dense.out, out, _per_row(rho), precision))
        call.memory["mask"], call.memory["kept"] = mask, call.step.index
        stop()
        return dense.out

    def _reuse(self, store: ResidualStore, call: Call) -> Tensor:
        order = call.tile_order(self._tile)
        out = call.ordered(order).attention(call.memory["mask"]).out
        if order is not None:
            out = order.undo(out)
        if not self.correct:
            return out
        # The first step after the dense one takes rho as it was. Skipped steps count: rho follows
        # the noise level.
        rho = call.memory["rho"] + self.ramp * (call.step.index - call.memory["kept"] - 1)
        if self.clamp:
            rho = rho.clamp_(max=1)
        return store.get(call).add_to(out, _per_row(rho))

    @property
    def _tile(self) -> tuple[int, int, int] | None:
        return None if self.mask == "window" else self.tile

    def _select(self, call: Call, lse: Tensor) -> PackedMask:
        """The mask for tokens in tile order, given the LSE of their rows over all keys."""
        layout, device = call.layout, call.q.device
        if self.mask == "window":
            return raster_window(layout, self.sparsity, self.block, device)
        if self.mask == "window3d":
            return nearest_window(layout, self.sparsity, self.block, self.tile, device)
        search = AdaSpa(self.sparsity, block=self.block, head_adaptive=self.head_adaptive)
        return search.select(call, call.block_mass(lse, self.block))


def softmax_share(lse_sparse: Tensor, lse_dense: Tensor) -> Tensor:
    """rho, the share of each row's softmax that falls on its kept keys, ``[batch, heads, tokens]``.

    A row without kept keys has none.

    Args:
        lse_sparse: Log of the softmax denominator over the kept keys, same shape.
        lse_dense: The same over all keys.

    Returns:
        fp32.
    """
    share = (lse_sparse - lse_dense).exp().float()
    return share.masked_fill(lse_sparse == float("-inf"), 0.0)


def _per_row(rho: Tensor) -> Tensor:
    """``[batch, heads, tokens]`` as a factor on ``[batch, tokens, heads, dim]``."""
    return rho.transpose(1, 2).unsqueeze(-1)
