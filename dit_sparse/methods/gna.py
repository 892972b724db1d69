"""GNA: every query attends to a window around it, at the cost of the blocks the windows fill.

Source: Generalized Neighborhood Attention, arXiv 2504.16922, and its implementation NATTEN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call, Method
from dit_sparse.methods.gna_plan import Plan, best_tile, propose, visited_share
from dit_sparse.neighborhood import Neighborhood, triple
from dit_sparse.neighborhood_mask import Arrangement, arrange
from dit_sparse.schedule import Phase, Step

Axes = int | tuple[int, int, int]
Summary = Literal["drop", "centroid", "first_order"]


@dataclass(frozen=True)
class GNA(Method):
    """Generalized neighborhood attention: sliding, strided and blocked windows on the token grid.

    The mask depends on the grid and these settings alone, so nothing is searched. Where windows and
    token order fit, whole blocks are kept and no pair is tested ("perfectly block-sparse");
    elsewhere only the blocks on the border of a window test their pairs. Text attends to and is
    attended by everything, inside the same softmax.

    Attributes:
        window: Tokens of a window along (frames, height, width), one int for all, -1 for a whole
            axis. Or a float in (0, 1): the density for which windows and strides are chosen on
            each grid, see :func:`~dit_sparse.methods.gna_plan.propose` and ``dit-sparse
            gna-plan``.
        stride: Queries that share a window, along each axis or one for all: 1 slides the window
            with every query, the window's size makes blocked attention. None is 1 or, where the
            windows are chosen, chosen with them.
        dilation: Distance between neighbouring keys of a window.
        causal: Axes along which no later key is seen.
        tile: Tokens along (frames, height, width) that the token order keeps together; None
            chooses.
        block: Tokens in a query and a key block, 64 or 128.
        warmup: First denoising steps that stay dense: a number of steps, or a share of them. The
            paper keeps 12 of 35 (Cosmos), 15 of 50 (HunyuanVideo) and 9 of 28 (FLUX).
        summary: What blocks outside all windows of a query block contribute: nothing, as in the
            paper, their means, or means and slope (see
            :class:`~dit_sparse.kernels.summary.BlockSummary`).

    Raises:
        ValueError: On a value outside these ranges, and at the first call if a window does not fit
            the grid.

    Source: arXiv 2504.16922, section 3 (windows), 4 (tiles), 5 (schedules); every parameter means
    what it means in NATTEN 0.21.
    """

    name = "gna"
    splits_heads = True

    window: float | Axes = 0.3
    stride: Axes | None = None
    dilation: Axes = 1
    causal: bool | tuple[bool, bool, bool] = False
    tile: tuple[int, int, int] | None = None
    block: int = 128
    warmup: int | float = 0.3
    summary: Summary = "drop"

    def __post_init__(self) -> None:
        if isinstance(self.window, float):
            if not 0 < self.window < 1:
                raise ValueError(
                    "window as a float is a density and must be in (0, 1), got "
                    f"{self.window}; whole windows are window=-1"
                )
            given = [("stride", self.stride, None), ("dilation", self.dilation, 1)]
            for name, value, default in [*given, ("causal", self.causal, False)]:
                if value != default:
                    raise ValueError(
                        f"with window={self.window}, a density, {name} is chosen too; give the "
                        f"windows in tokens to set {name}={value!r}"
                    )
        else:
            _at_least("window", self.window, 1, also=-1)
        if self.stride is not None:
            _at_least("stride", self.stride, 1)
        _at_least("dilation", self.dilation, 1)
        triple("causal", self.causal)
        if self.tile is not None:
            if isinstance(self.tile, int):
                raise ValueError(f"tile must be (frames, height, width), got {self.tile!r}")
            _at_least("tile", self.tile, 1)
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128 tokens, got {self.block!r}")
        if self.summary not in get_args(Summary):
            raise ValueError(f"summary must be one of {get_args(Summary)}, got {self.summary!r}")
        share = isinstance(self.warmup, float)
        if (
            isinstance(self.warmup, bool)
            or not isinstance(self.warmup, int | float)
            or not (0 <= self.warmup <= 1 if share else self.warmup >= 0)
        ):
            raise ValueError(
                f"warmup must be a number of steps or a share in [0, 1], got {self.warmup!r}"
            )

    @classmethod
    def exact(cls) -> GNA:
        return cls(window=-1, warmup=0)

    def at_budget(self, share: float) -> GNA:
        return replace(
            self,
            window=-1 if share >= 1 else float(share),
            stride=None,
            dilation=1,
            causal=False,
        )

    def attend(self, call: Call) -> Tensor:
        if self._is_warmup(call.step):
            call.record(Phase.DENSE)
            return call.dense()
        arrangement = self._arrangement(call)
        mask, order = arrangement.mask, arrangement.order
        call.memory["mask"] = mask
        call.record(Phase.SPARSE, mask)
        moved = call.ordered(order)
        summary = None
        if self.summary != "drop":
            summary = moved.summarize(self.block, self.summary == "first_order")
        out = moved.neighborhood_attention(mask, summary).out
        return out if order is None else order.undo(out)

    def _is_warmup(self, step: Step) -> bool:
        if not isinstance(self.warmup, float):
            return step.index < self.warmup
        if step.total is None:
            return step.progress < self.warmup
        return step.index < round(self.warmup * step.total)

    def _arrangement(self, call: Call) -> Arrangement:
        plan = self.plan(call.layout)
        return arrange(call.layout, plan.neighborhood, plan.tile, plan.block, call.q.device)

    def plan(self, layout: TokenLayout) -> Plan:
        """The windows and the token order on ``layout``.

        Raises:
            ValueError: If a window does not fit the grid.
        """
        return _plan(self, layout.grid)


@lru_cache(maxsize=64)
def _plan(method: GNA, grid: tuple[int, int, int]) -> Plan:
    if isinstance(method.window, float):
        found = propose(grid, method.window, method.block)[0]
        if method.tile is None:
            return found
        neighborhood = found.neighborhood
    else:
        neighborhood = Neighborhood.on(
            grid, method.window, method.stride or 1, method.dilation, method.causal
        )
    tile = method.tile or best_tile(neighborhood, method.block)
    return Plan(neighborhood, tile, method.block, visited_share(neighborhood, tile, method.block))


def _at_least(name: str, value: Axes, least: int, also: int | None = None) -> None:
    if any(v < least and v != also for v in triple(name, value)):
        bound = f"at least {least}" + (f" or {also}" if also is not None else "")
        raise ValueError(f"{name} must be {bound} along every axis, got {value!r}")
