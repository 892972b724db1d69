"""What sparse attention missed at a dense step, kept for the steps that follow.

A method that corrects sparse attention over time keeps ``R = dense - factor * sparse`` at a step in
which it computes both, and returns ``factor * sparse + R`` at later ones. With factor rho this is
Re-ttention (arXiv 2505.22918); with factor 1 the correction is a plain difference.

R is kept before the output projection W, as ``[batch, tokens, heads, dim]``. After it would give
the same: ``W(O + R) + b = (W O + b) + W R``, so the bias enters once either way, and heads * dim is
the width of the model, so the bytes are the same too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch

from dit_sparse.methods.base import Call, Method
from dit_sparse.methods.residual_plan import (
    BranchShape,
    ResidualOptions,
    ResidualPlan,
    device_budget,
)
from dit_sparse.methods.residual_values import HostResidual, Residual, pairs
from dit_sparse.methods.transfer import Copy, HostArena, transfer_for

# Cache contexts in which diffusers runs both CFG branches as one batch.
_BOTH_AT_ONCE = ("cond_uncond",)


class _Ahead(NamedTuple):
    source: HostResidual
    target: Residual
    copy: Copy


class ResidualStore:
    """The residuals of one generation: what they may take, where they are, and getting them back.

    The residuals themselves are in the memory of their calls, so that they share its life and its
    separation by branch and layer. Those in host memory are fetched one use ahead: residuals are
    used in the same order at every step, so the order of the last step foretells that of this one,
    and a wrong guess costs only time.

    Args:
        options: How residuals are kept. With ``adapt`` the attribute of this name becomes what they
            are kept by once the first branch is admitted.
        tensors: Residuals that the method keeps for one layer and branch.
        row_statistics: fp32 numbers that it keeps for each row beside them.
    """

    def __init__(self, options: ResidualOptions, tensors: int = 1, row_statistics: int = 0) -> None:
        self.options = options
        self.plan: ResidualPlan | None = None
        self._kept = (tensors, row_statistics)
        self._asked: dict[str, BranchShape] = {}
        self._shapes: dict[str, BranchShape] = {}  # of the branches that keep residuals
        self._budgets: tuple[int | None, int] | None = None
        self._layers: dict[str, frozenset[int]] = {}
        self._arena: HostArena | None = None
        self._on_host: WeakValueDictionary[tuple, HostResidual] = WeakValueDictionary()
        # The use that followed each use, the last use, what was saved since the last fetch, and the
        # copies under way.
        self._follower: dict[tuple, tuple] = {}
        self._last: tuple | None = None
        self._fresh: set[tuple] = set()
        self._ahead: _Ahead | None = None
        self._saving: Copy | None = None

    def admit(self, call: Call) -> bool:
        """Whether the layer of ``call`` keeps a residual.

        The first call of each CFG branch, in the first step of a generation, settles whether all
        residuals will fit, before any work is lost.

        Raises:
            ValueError: If they will not, unless the options adapt.
        """
        batch, tokens, heads, dim = call.q.shape
        shape = BranchShape(batch, tokens, heads, dim, call.q.dtype)
        branch = call.step.branch
        if self._asked.get(branch) != shape:
            plan = self._admit(call, {**self._shapes, branch: shape})
            if plan is None:
                note = f"residual: none for branch {branch!r}, there is no room"
                call.notes[f"residual of {branch}"] = note
                self._layers[branch] = frozenset()
            else:
                self.plan, self._shapes[branch] = plan, shape
                call.notes["residual"] = plan.describe()
                self._layers[branch] = frozenset(plan.held_layers)
            self._asked[branch] = shape
        return call.layer in self._layers[branch]

    def _admit(self, call: Call, shapes: dict[str, BranchShape]) -> ResidualPlan | None:
        """A plan that fits; None if there is none and the options adapt."""
        if not self.options.adapt:
            plan = self._make_plan(call, shapes)
            call.notes["residual"] = plan.describe()
            plan.check()
            return plan
        # Settings give way only before anything is kept.
        if self.plan is not None:
            more = self._make_plan(call, shapes)
            return more if more.fits() else None
        expected = dict(shapes)
        if len(shapes) == 1 and call.step.branch not in _BOTH_AT_ONCE:
            # Guidance most often adds a second branch of the same shape, in the same first step.
            expected["its twin"] = next(iter(shapes.values()))
        fitting = self._make_plan(call, expected).adapted()
        if fitting is None:
            return None
        self.options = fitting.options
        return self._make_plan(call, shapes)

    def _make_plan(self, call: Call, shapes: dict[str, BranchShape]) -> ResidualPlan:
        device = call.q.device
        if self._budgets is None:
            # Before anything is kept: later the residuals themselves would count as taken.
            models = 1 + call.models_waiting()
            self._budgets = (
                device_budget(self.options, device, models),
                transfer_for(device).host_budget() // models,
            )
        return ResidualPlan(
            self.options,
            call.layers,
            call.dense_layers,
            tuple(shapes.items()),
            device,
            *self._budgets,
            *self._kept,
        )

    def put(self, call: Call, residual: Residual, slot: int = 0) -> None:
        """Keeps ``residual`` for the layer and branch of ``call``, in place of an earlier one.

        What :meth:`get` returned may be amended in place and kept again.

        Args:
            call: Where from.
            residual: On the device.
            slot: Which one, if the method keeps several.
        """
        key, name = self._key(call, slot)
        self._note_use(key)
        if not self.options.offload:
            call.memory[name] = residual
            return
        self._settle()
        held = call.memory.get(name)
        if held is None:
            held = call.memory[name] = self._on_host[key] = self._reserve(call, residual)
        if self._ahead is not None and self._ahead.source is held:
            # It was fetched for a step that turned out to be a dense one.
            self._ahead.copy.wait()
            self._ahead = None
        sources, targets = pairs(residual, held)
        self._saving = transfer_for(call.q.device).copy(sources, targets)
        self._fresh.add(key)
        if self._follower.get(key) in self._fresh:
            # All are saved, so that the next use is the first one of the coming step.
            self._look_ahead(call, key)

    def get(self, call: Call, slot: int = 0) -> Residual:
        """The residual kept for the layer and branch of ``call``, on its device."""
        key, name = self._key(call, slot)
        held = call.memory[name]
        if isinstance(held, Residual):
            return held
        self._settle()
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.copy.wait()
        if ahead is None or ahead.source is not held:
            ahead = self._fetch(call, held)
            ahead.copy.wait()
        self._note_use(key)
        self._fresh.clear()
        self._look_ahead(call, key)
        return ahead.target

    def drop(self, call: Call, slot: int = 0) -> None:
        """Forgets the residual of the layer and branch of ``call``."""
        call.memory.pop(self._key(call, slot)[1], None)

    def _key(self, call: Call, slot: int) -> tuple[tuple, str]:
        return (call.step.branch, call.layer, slot), f"residual{slot}"

    def _note_use(self, key: tuple) -> None:
        # A residual that is taken, amended and kept again counts once.
        if self._last not in (None, key):
            self._follower[self._last] = key
        self._last = key

    def _look_ahead(self, call: Call, key: tuple) -> None:
        follower = self._on_host.get(self._follower.get(key, ()))
        if follower is not None:
            self._ahead = self._fetch(call, follower)

    def _settle(self) -> None:
        """Frees the device end of the last save."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None

    def _reserve(self, call: Call, residual: Residual) -> HostResidual:
        if self._arena is None:
            self._arena = HostArena(transfer_for(call.q.device))
        parts = [
            () if x is None else self._arena.take(x.numel() * x.element_size())
            for x in (residual.values, residual.scale)
        ]
        return HostResidual(tuple(residual.values.shape), residual.values.dtype, *parts)

    def _fetch(self, call: Call, held: HostResidual) -> _Ahead:
        device = call.q.device
        scale = None
        if held.scale:
            scale = torch.empty(*held.shape[:-1], 1, dtype=torch.float32, device=device)
        target = Residual(torch.empty(held.shape, dtype=held.dtype, device=device), scale)
        targets, sources = pairs(target, held)
        return _Ahead(held, target, transfer_for(device).copy(sources, targets))


@dataclass(frozen=True, kw_only=True)
class ResidualMethod(Method):
    """A method that keeps residuals between steps; these are its settings for their memory.

    Attributes:
        precision: In which they are kept: ``"native"`` (that of the attention output),
            ``"bfloat16"``, or ``"float8"`` (e4m3 with one fp32 scale for each token and head).
        offload: Whether they live in (on CUDA pinned) host memory, fetched one layer ahead on a
            stream of its own.
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

    row_statistics: ClassVar[int] = 0

    precision: str = "native"
    offload: bool = False
    layers: int | tuple[int, ...] | None = None
    budget_gb: float | None = None
    adapt: bool = False

    def __post_init__(self) -> None:
        _ = self.residual_options

    def residuals_kept(self) -> int:
        """Residuals that the method keeps for one layer and branch."""
        return 1

    @property
    def residual_options(self) -> ResidualOptions:
        return ResidualOptions(
            self.precision, self.offload, self.layers, self.budget_gb, self.adapt
        )

    def residual_store(self, call: Call) -> ResidualStore:
        """The store of the generation of ``call``."""
        store = call.shared.get("residuals")
        if store is None:
            kept = self.residuals_kept()
            store = ResidualStore(self.residual_options, kept, self.row_statistics)
            call.shared["residuals"] = store
        return store
