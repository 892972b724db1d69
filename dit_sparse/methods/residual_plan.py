"""How much memory the residuals of a generation take, known before any is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dit_sparse.methods.transfer import HOST_SHARE

PRECISIONS = ("native", "bfloat16", "float8")
# Share of the memory that is free on a device at the first step, where no budget is given: what is
# left must hold the activations of a layer and, at the end, of the decoder.
DEVICE_SHARE = 0.5
# Residuals of one layer that are on the device at a time when they live in host memory: the one in
# use and the one on its way.
IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class ResidualOptions:
    """How residuals are kept.

    Attributes:
        precision: ``"native"`` (that of the attention output), ``"bfloat16"``, or ``"float8"``
            (e4m3 with one fp32 scale for each token and head).
        offload: Whether they live in host memory, fetched one layer ahead of their use.
        layers: Layers that keep one, by index in execution order; a number spreads as many evenly
            over the model; None is every layer.
        budget_gb: Most device memory that they may take, in 10^9 bytes, for each model of a
            pipeline. None is half of what is free at the first step on CUDA, shared with experts
            that have their turn later, and no limit elsewhere.
        adapt: Whether the other settings give way where the residuals do not fit: fewer bits, then
            host memory, then fewer layers. If not, they are refused.

    Raises:
        ValueError: On a value outside these ranges.
    """

    precision: str = "native"
    offload: bool = False
    layers: int | tuple[int, ...] | None = None
    budget_gb: float | None = None
    adapt: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        for name in ("offload", "adapt"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        given = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        if self.layers is not None and (
            not given
            or len(set(given)) < len(given)
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in given)
            or self.layers == 0
        ):
            raise ValueError(
                "layers must be a number of layers (int >= 1), different layer indices (a tuple "
                f"of ints >= 0) or None for all, got {self.layers!r}"
            )
        budget = self.budget_gb
        if budget is not None and (
            isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0
        ):
            raise ValueError(f"budget_gb must be a number >= 0 or None, got {budget!r}")

    def held_layers(self, layers: int, dense_layers: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The layers that keep a residual, ascending.

        Args:
            layers: Self-attention layers of the model.
            dense_layers: Layers that stay dense by configuration and need none.

        Raises:
            ValueError: If a layer does not exist or stays dense, or there are not so many.
        """
        free = tuple(n for n in range(layers) if n not in dense_layers)
        if self.layers is None:
            return free
        if isinstance(self.layers, tuple):
            absent = sorted(set(self.layers) - set(free))
            if absent:
                raise ValueError(
                    f"layers must be out of the {len(free)} layers that are not kept dense, below "
                    f"{layers}, got {absent}"
                )
            return tuple(sorted(self.layers))
        if self.layers > len(free):
            raise ValueError(
                f"layers must be at most {len(free)}, the layers of this model that are not kept "
                f"dense, got {self.layers}; None means all of them"
            )
        # The middles of as many equal stretches.
        return tuple(free[(2 * n + 1) * len(free) // (2 * self.layers)] for n in range(self.layers))


@dataclass(frozen=True, slots=True)
class BranchShape:
    """The attention output ``[batch, tokens, heads, dim]`` of one CFG branch."""

    batch: int
    tokens: int
    heads: int
    dim: int
    dtype: torch.dtype

    def rows(self) -> int:
        """Rows of attention: one for each token and head."""
        return self.batch * self.tokens * self.heads

    def residual_bytes(self, precision: str) -> int:
        """Bytes of one residual of one layer."""
        if precision == "float8":
            return self.rows() * (self.dim + torch.float32.itemsize)
        width = self.dtype if precision == "native" else torch.bfloat16
        return self.rows() * self.dim * width.itemsize


@dataclass(frozen=True, slots=True)
class ResidualPlan:
    """What a generation keeps, and the memory that it may take.

    Attributes:
        options: How residuals are kept.
        layers: Layers of the model.
        dense_layers: Those that stay dense by configuration.
        branches: Shapes of the CFG branches, by name, as far as they are known.
        device: Where attention runs.
        budget: Most bytes on the device, or None for no limit.
        host_available: Most bytes in host memory.
        tensors: Residuals kept for one layer and branch.
        row_statistics: fp32 numbers that the method keeps for each row beside them; these stay on
            the device.
    """

    options: ResidualOptions
    layers: int
    dense_layers: tuple[int, ...]
    branches: tuple[tuple[str, BranchShape], ...]
    device: torch.device
    budget: int | None
    host_available: int
    tensors: int = 1
    row_statistics: int = 0

    @property
    def held_layers(self) -> tuple[int, ...]:
        return self.options.held_layers(self.layers, self.dense_layers)

    @property
    def residual_bytes(self) -> int:
        """Bytes of all residuals, wherever they are."""
        one = sum(shape.residual_bytes(self.options.precision) for _, shape in self.branches)
        return one * self.tensors * len(self.held_layers)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of all row statistics."""
        rows = sum(shape.rows() for _, shape in self.branches)
        return rows * self.row_statistics * torch.float32.itemsize * len(self.held_layers)

    @property
    def device_bytes(self) -> int:
        """Most bytes that are on the device at a time."""
        if not self.options.offload:
            return self.residual_bytes + self.statistics_bytes
        largest = max(
            (shape.residual_bytes(self.options.precision) for _, shape in self.branches), default=0
        )
        return largest * IN_FLIGHT + self.statistics_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return self.residual_bytes if self.options.offload else 0

    def fits(self) -> bool:
        """Whether the memory is there."""
        on_device = self.budget is None or self.device_bytes <= self.budget
        return on_device and self.host_bytes <= self.host_available

    def describe(self) -> str:
        """One line for the report."""
        where = f"{_gb(self.device_bytes)} on {self.device}"
        if self.options.offload:
            where = f"{_gb(self.host_bytes)} in host memory, {where}"
        limit = "no limit" if self.budget is None else f"at most {_gb(self.budget)} there"
        return f"residual: {where} ({limit}); {self._contents()}"

    def check(self) -> None:
        """Refuses a plan that does not fit, with the plans that would.

        Raises:
            ValueError: If it does not fit; lists the numbers and the options.
        """
        if self.fits():
            return
        budget = math.inf if self.budget is None else self.budget
        if self.device_bytes > budget:
            need, limit, where = self.device_bytes, budget, str(self.device)
            source = (
                f"half of what was free on {self.device} at the first step; budget_gb changes it"
                if self.options.budget_gb is None
                else f"budget_gb={self.options.budget_gb}"
            )
        else:
            need, limit, where = self.host_bytes, self.host_available, "host memory"
            source = f"{HOST_SHARE:.0%} of the host memory that is available"
        choices = "; ".join(
            f"{label} ({_gb(plan.device_bytes)} on {self.device}"
            + (f", {_gb(plan.host_bytes)} in host memory)" if plan.host_bytes else ")")
            for label, plan in self.alternatives()
        )
        raise ValueError(
            f"expected the residual to take at most {_gb(limit)} of {where} ({source}), got "
            f"{_gb(need)}: {self._contents()}; "
            + (f"what fits: {choices}" if choices else "no setting fits, use fewer tokens")
        )

    def adapted(self) -> ResidualPlan | None:
        """This plan if it fits, else the one that keeps most and does, or None.

        Fewer bits come before host memory, which costs time, and both before fewer layers.
        """
        if self.fits():
            return self
        every = len(self.held_layers)
        for _, plan in self.alternatives():
            if len(plan.held_layers) == every:
                return plan
        fewer = (self._with(precision="float8", layers=n) for n in range(every - 1, 0, -1))
        return next((plan for plan in fewer if plan.fits()), None)

    def alternatives(self) -> Iterator[tuple[str, ResidualPlan]]:
        """The settings nearby that fit, as a user would write them, with their plans."""
        seen = set()
        for offload in (False, True):
            for precision in (self.options.precision, *PRECISIONS):
                plan = self._with(precision=precision, offload=offload)
                size = (plan.residual_bytes, offload)
                if plan.fits() and size not in seen:
                    seen.add(size)
                    yield self._label(plan), plan
        for options in ({}, {"precision": "float8"}, {"precision": "float8", "offload": True}):
            for count in range(len(self.held_layers) - 1, 0, -1):
                plan = self._with(layers=count, **options)
                if plan.fits():
                    yield self._label(plan), plan
                    return

    def _with(self, **options: object) -> ResidualPlan:
        return replace(self, options=replace(self.options, **options))  # type: ignore[arg-type]

    def _label(self, plan: ResidualPlan) -> str:
        changed = [
            f"{name}={getattr(plan.options, name)!r}"
            for name in ("precision", "offload", "layers")
            if getattr(plan.options, name) != getattr(self.options, name)
        ]
        return ", ".join(changed)

    def _contents(self) -> str:
        shapes = ", ".join(
            f"{name} [{s.batch}, {s.tokens}, {s.heads}, {s.dim}] {str(s.dtype).split('.')[-1]}"
            for name, s in self.branches
        )
        return (
            f"{len(self.held_layers)} of {self.layers} layers x {len(self.branches)} branches "
            f"({shapes}) in {self.options.precision} precision"
            + (f", row statistics {_gb(self.statistics_bytes)}" if self.row_statistics else "")
        )


def device_budget(options: ResidualOptions, device: torch.device, models: int = 1) -> int | None:
    """Most bytes that residuals of one model may take on ``device``; None for no limit.

    Args:
        options: Their ``budget_gb`` is that of one model.
        device: Where attention runs.
        models: Models that are still to share what is free, this one included.
    """
    if options.budget_gb is not None:
        return int(options.budget_gb * 1e9)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What the allocator holds without using it is free for us too.
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + cached) * DEVICE_SHARE / models)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
