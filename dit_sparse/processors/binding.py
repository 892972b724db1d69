"""Binding sparse attention to one model, and undoing it without a trace."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from dit_sparse.config import SparseConfig
from dit_sparse.kernels.native_lse import native_attention_with_lse
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call
from dit_sparse.methods.dense import Dense
from dit_sparse.processors.checks import check_bindable, check_implementation
from dit_sparse.processors.hooks import ForwardHooks, find_generation_hook
from dit_sparse.processors.op import register_site
from dit_sparse.processors.rewrap import rewrap, site_of
from dit_sparse.processors.run import Run

# Generations of one step in a row after which something must be wrong.
LONE_STEPS = 3


class Scope:
    """What the current forward pass tells its layers. Plain attributes, so Dynamo can trace it."""

    def __init__(self) -> None:
        self.timestep: Tensor | None = None
        self.layout: list[int] = []


class Site:
    """One self-attention layer of a bound model."""

    def __init__(self, binding: Binding, index: int, name: str, module: Any, original: Any) -> None:
        self.binding = binding
        self.scope = binding.scope
        self.index = index
        self.name = name
        self.module = module
        self.original = original
        self.handle = register_site(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        # A copied model must not reach the state of the original through its handle.
        new = memo[id(self)] = Site.__new__(Site)
        for name, value in vars(self).items():
            if name != "handle":
                setattr(new, name, copy.deepcopy(value, memo))
        new.handle = register_site(new)
        return new

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        timestep: Tensor | None,
        layout: TokenLayout,
        scale: float | None,
    ) -> Tensor:
        """Self-attention ``[batch, tokens, heads, dim]`` by the bound method."""
        binding = self.binding
        if q.shape[1] != layout.tokens or k.shape[1] != layout.tokens:
            raise RuntimeError(
                f"{self.name} attends over {q.shape[1]} queries and {k.shape[1]} keys, but the "
                f"forward arguments describe {layout.tokens} tokens ({layout})"
            )
        binding.check_numerics(q)
        run = binding.run
        branch = run.enter(self.index, timestep, layout, binding.timesteps(), q)
        call = Call(
            q=q,
            k=k,
            v=v,
            layout=layout,
            step=branch.step,
            layer=self.index,
            layers=len(binding.sites),
            key_valid=_valid_keys(attn_mask, q, self.name),
            memory=branch.memory.setdefault(self.index, {}),
            scale=scale,
            impl=binding.config.impl,
            dense_attention=lambda with_lse: self._dense(q, k, v, attn_mask, scale, with_lse),
        )
        method = Dense() if self.index in binding.config.dense_layers else binding.config.method
        stop = run.attention_watch.start(q.device)
        out = method.attend(call)
        stop()
        run.note(call)
        return out

    def _dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        scale: float | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention and, if asked for and to be had for free, its row LSE."""
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _AttentionBackendRegistry,
            dispatch_attention_fn,
        )

        # Read at each call: set_attention_backend may come before or after us.
        backend = getattr(self.module.processor, "_attention_backend", None)
        if with_lse and attn_mask is None:
            active = backend or _AttentionBackendRegistry.get_active_backend()[0]
            if active == AttentionBackendName.NATIVE:
                found = native_attention_with_lse(q, k, v, scale)
                if found is not None:
                    return found
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=0.0,
            is_causal=False,
            scale=scale,
            backend=backend,
        )
        return out, None


def _valid_keys(attn_mask: Tensor | None, q: Tensor, name: str) -> Tensor | None:
    """A padding mask as ``[batch, tokens]`` bool."""
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool or attn_mask.ndim != 4 or attn_mask.shape[1:3] != (1, 1):
        raise NotImplementedError(
            f"{name}: sparse attention takes a padding mask, bool [batch, 1, 1, tokens], got "
            f"{attn_mask.dtype} {tuple(attn_mask.shape)}"
        )
    return attn_mask[:, 0, 0].expand(q.shape[0], -1)


class Binding:
    """Sparse attention on one model: its sites, its state, and the way back.

    Args:
        model: A transformer with a family adapter.
        config: What to compute.
        pipeline: The pipeline around it, if known: its scheduler tells the number of steps.
        owner: The SparseProcessor that makes it.

    Raises:
        ValueError: If the model has no adapter, is already bound, or a dense layer does not exist.
        NotImplementedError: If a processor cannot be wrapped, the model runs context parallelism,
            or a named kernel cannot compute its layers.
    """

    def __init__(
        self, model: Any, config: SparseConfig, pipeline: Any = None, owner: Any = None
    ) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self.model = model
        self.config = config
        self.family, modules = check_bindable(model, config)
        self.scope = Scope()
        self.run = Run()
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        self._timesteps: tuple[Any, tuple[float, ...]] | None = None
        self._numerics: tuple[int, torch.dtype, torch.device] | None = None
        self._has_warned = False
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
            site.module.set_processor(processor)
        self.hooks = ForwardHooks(self)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied with the model; a copy learns its steps elsewhere.
        return {**vars(self), "_pipeline": None, "_owner": None}

    @property
    def owner(self) -> Any:
        """The SparseProcessor that made this, if it is still alive."""
        return self._owner() if self._owner is not None else None

    def remove(self) -> None:
        """Puts the original processor objects back and removes all hooks. Idempotent."""
        for site in self.sites:
            if site_of(site.module.processor) is site:
                backend = getattr(site.module.processor, "_attention_backend", None)
                if backend is not getattr(site.original, "_attention_backend", None):
                    # set_attention_backend was called while we were here.
                    site.original._attention_backend = backend
                site.module.set_processor(site.original)
        self.hooks.remove()
        self.run.end_generation()

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
            values = torch.as_tensor(timesteps).double().tolist()
            self._timesteps = (timesteps, tuple(dict.fromkeys(values)))
        return self._timesteps[1]

    def check_numerics(self, q: Tensor) -> None:
        """Refuses a named kernel for ``q`` at the first call, not where it would first be used."""
        numerics = (q.shape[-1], q.dtype, q.device)
        if numerics != self._numerics:
            check_implementation(self.config, *numerics)
            self._numerics = numerics

    def check_alive(self) -> None:
        """Warns once, or raises if ``strict``, where sparse attention was lost since it was bound.

        Called after a forward pass, and at the end of a pipeline call for a compiled model.

        Raises:
            RuntimeError: If it was lost and the configuration is strict.
        """
        modules = self.family.sites(self.model)
        lost = [name for name, module in modules if not self._owns(module)]
        kind = type(self.model).__name__
        if lost:
            message = (
                f"{len(lost)} of {len(modules)} self-attention layers of this {kind} "
                f"({lost[0]}{', ...' if len(lost) > 1 else ''}) no longer have their sparse "
                "processor: something replaced it, such as fuse_qkv_projections() of some models; "
                "put sparse attention on again after that"
            )
        elif self.run.is_idle:
            # Step caches skip layers and whole steps, but never the first pass of a generation.
            message = (
                f"no self-attention call of this {kind} reached sparse attention in a whole "
                "forward pass: its blocks do not call their attention processors"
            )
        elif self.run.lone_steps >= LONE_STEPS:
            message = (
                f"the denoising step of this {kind} cannot be followed, so its attention stays "
                f"dense: each of the last {LONE_STEPS} looked like the first of a generation "
                "(timesteps that rise or stay the same); call the transformer inside "
                "cache_context(name, step_index=..., num_inference_steps=...)"
            )
        else:
            return
        if self.config.strict:
            raise RuntimeError(message)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=2)

    def _owns(self, module: Any) -> bool:
        site = site_of(getattr(module, "processor", None))
        return site is not None and site.binding is self


def binding_of(model: nn.Module) -> Binding | None:
    """The sparse attention on ``model``, even if its processors have been replaced since."""
    hook = find_generation_hook(model)
    return hook.binding if hook is not None else None
