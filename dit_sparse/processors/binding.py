"""Binding sparse attention to one model, and undoing it without a trace."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.config import SparseConfig
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.transfer import release_host_memory
from dit_sparse.processors.balance import HeadBalance
from dit_sparse.processors.caches import CacheCheck
from dit_sparse.processors.checks import (
    check_bindable,
    check_implementation,
    check_parallel,
    needs_sparse_attention,
)
from dit_sparse.processors.hooks import ForwardHooks, find_generation_hook
from dit_sparse.processors.identity import identify
from dit_sparse.processors.rewrap import rewrap, site_of, unwrap
from dit_sparse.processors.run import Run
from dit_sparse.processors.site import ForwardPass, Scope, Site
from dit_sparse.processors.ulysses import Ulysses

# Generations of one step in a row after which something must be wrong.
LONE_STEPS = 3
# Steps of a generation of which one or more should be sparse: one alone has to find its mask.
LEAST_STEPS = 2


class Binding:
    """Sparse attention on one model: its sites, its state, and the way back.

    Args:
        model: A transformer with a family adapter.
        config: What to compute.
        pipeline: The pipeline around it, if known: its scheduler tells the number of steps.
        owner: The SparseProcessor that makes it.

    Raises:
        ValueError: If the model has no adapter, is already bound, or a dense layer does not exist.
        NotImplementedError: If a processor cannot be wrapped, the model splits its sequence over
            devices in a way that cannot be followed, or a named kernel cannot compute its layers.
    """

    def __init__(
        self, model: Any, config: SparseConfig, pipeline: Any = None, owner: Any = None
    ) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self.model = model
        self.config = config
        self.family, modules = check_bindable(model, config)
        self.identity = identify(model, pipeline)
        # What computes each call. An offline search puts itself here to see all of them.
        self.attend: Callable[[Call], Tensor] = self._attend_by_config
        self.scope = Scope()
        self.run = Run()
        self.passing = ForwardPass(TokenLayout((1, 1, 1)))
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self.balance = HeadBalance()
        # The parallel configuration that the devices were read from.
        self._parallel: Any = None
        self._devices: Ulysses | None = None
        self._timesteps: tuple[Any, tuple[float, ...]] | None = None
        self._numerics: tuple[int, torch.dtype, torch.device] | None = None
        self._told: set[str] = set()
        bound = [name for name, module in modules if site_of(module.processor) is not None]
        if bound:
            raise ValueError(
                f"sparse attention is already on this {type(model).__name__} ({bound[0]}, ...); "
                "remove it first"
            )
        self.sites = [
            Site(self, index, name, module, module.processor)
            for index, (name, module) in enumerate(modules)
        ]
        # All processors are made before the first is set: a refusal leaves the model untouched.
        processors = [rewrap(site.original, site) for site in self.sites]
        for site, processor in zip(self.sites, processors, strict=True):
            _set_processor(site.module, processor)
        self.hooks = ForwardHooks(self)
        self._caches = CacheCheck(model, [site.name for site in self.sites])

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied with the model; a copy learns its steps elsewhere.
        nothing = dict.fromkeys(("_pipeline", "_owner", "_parallel", "_devices"))
        return {**vars(self), **nothing}

    @property
    def owner(self) -> Any:
        """The SparseProcessor that made this, if it is still alive."""
        return self._owner() if self._owner is not None else None

    def remove(self, replaced: bool = False) -> None:
        """Puts the original processor objects back and removes all hooks. Idempotent.

        Args:
            replaced: Whether other sparse attention is put on at once.
        """
        if self.is_active() and not replaced and needs_sparse_attention(self.model, self.family):
            warnings.warn(
                f"the sequence of this {type(self.model).__name__} stays split over devices, by a "
                "plan that only sparse attention follows: without it the output is wrong. Put "
                'sparse attention on again, e.g. with the method "dense", or load the model anew',
                stacklevel=3,
            )
        for site in self.sites:
            if site_of(site.module.processor) is site:
                _set_processor(site.module, unwrap(site.module.processor))
        self.hooks.remove()
        self.run.end_generation()
        if not replaced:
            release_host_memory()

    def _attend_by_config(self, call: Call) -> Tensor:
        is_dense = call.layer in self.config.dense_layers
        return (Dense() if is_dense else self.config.method).attend(call)

    def adopt(self) -> None:
        """Wraps the processors that a feature of diffusers has put in the place of ours.

        One that cannot be wrapped stays as it is, and :meth:`check_alive` tells of it.
        """
        for site in self.sites:
            processor = site.module.processor
            if site_of(processor) is site:
                continue
            with contextlib.suppress(NotImplementedError):
                wrapped = rewrap(processor, site)
                site.original = processor
                _set_processor(site.module, wrapped)

    def models_waiting(self) -> int:
        """Other models that were bound with this pipeline and have not begun this generation."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is None or self.owner is None:
            return 0
        others = [b for b in self.owner.bindings if b is not self and b._pipeline is not None]
        return sum(b._pipeline() is pipeline and b.run.is_idle for b in others)

    def is_active(self) -> bool:
        """Whether any site still holds our processor."""
        return any(site_of(site.module.processor) is site for site in self.sites)

    def timesteps(self) -> tuple[float, ...] | None:
        """The distinct timesteps of the current generation, where the pipeline is known."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        if timesteps is None:
            return None
        if self._timesteps is None or self._timesteps[0] is not timesteps:
            # Read once a generation; a second-order scheduler lists most of them twice.
            values = self.family.noise_level(torch.as_tensor(timesteps).double()).tolist()
            self._timesteps = (timesteps, tuple(dict.fromkeys(values)))
        return self._timesteps[1]

    def devices(self) -> Ulysses | None:
        """The devices over which the model splits its sequence now, or None.

        Raises:
            NotImplementedError: If this cannot run there.
        """
        parallel = getattr(self.model, "_parallel_config", None)
        if parallel is not self._parallel:
            self._devices = check_parallel(self.model, self.family, self.config)
            self._parallel = parallel
        return self._devices

    def check_numerics(self, q: Tensor) -> None:
        """Refuses a named kernel for ``q`` at the first call, not where it would first be used."""
        numerics = (q.shape[-1], q.dtype, q.device)
        if numerics != self._numerics:
            check_implementation(self.config, *numerics)
            self._numerics = numerics

    def check_alive(self) -> None:
        """Warns once, or raises if ``strict``, where something does not do what was asked.

        That is sparse attention that was lost since it was bound, or a step cache beside it. Called
        after a forward pass, and at the end of a pipeline call for a compiled model.

        Raises:
            RuntimeError: If there is such a thing and the configuration is strict.
        """
        message = self._loss() or self._caches.problem(self.run, self._devices is not None)
        if message is None:
            return
        if self.config.strict:
            raise RuntimeError(message)
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)

    def _loss(self) -> str | None:
        modules = self.family.sites(self.model)
        lost = [name for name, module in modules if not self._owns(module)]
        kind = type(self.model).__name__
        if lost:
            return (
                f"{len(lost)} of {len(modules)} self-attention layers of this {kind} "
                f"({lost[0]}{', ...' if len(lost) > 1 else ''}) no longer have their sparse "
                "processor: something replaced it; put sparse attention on again after that"
            )
        if self.run.is_idle:
            # Step caches skip layers and whole steps, but never the first pass of a generation.
            return (
                f"no self-attention call of this {kind} reached sparse attention in a whole "
                "forward pass: its blocks do not call their attention processors"
            )
        if self.run.lone_steps >= LONE_STEPS:
            return (
                f"the denoising step of this {kind} cannot be followed, so its attention stays "
                f"dense: each of the last {LONE_STEPS} looked like the first of a generation "
                "(timesteps that rise or stay the same); call the transformer inside "
                "cache_context(name, step_index=..., num_inference_steps=...)"
            )
        steps = self.run.stayed_dense
        if steps >= LEAST_STEPS and self._is_meant_sparse():
            return (
                f"attention of this {kind} was dense in all {steps} steps of a generation: the "
                f"warm-up of {self.config.method} may be longer than that; give it as a share of "
                "the steps, or fewer of them"
            )
        return None

    def _is_meant_sparse(self) -> bool:
        # An offline search that looks on decides for itself.
        if self.attend != self._attend_by_config or isinstance(self.config.method, Dense):
            return False
        return len(set(self.config.dense_layers)) < len(self.sites)

    def _owns(self, module: Any) -> bool:
        site = site_of(getattr(module, "processor", None))
        return site is not None and site.binding is self


def binding_of(model: nn.Module) -> Binding | None:
    """The sparse attention on ``model``, even if its processors have been replaced since."""
    hook = find_generation_hook(model)
    return hook.binding if hook is not None else None


def _set_processor(module: Any, processor: Any) -> None:
    # MochiAttention has no such method.
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor
