"""Binding sparse attention to one model, and undoing it without a trace."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from dit_sparse.config import SparseConfig
from dit_sparse.kernels.native_lse import native_attention_with_lse
from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call
from dit_sparse.methods.dense import Dense
from dit_sparse.processors.family import family_of
from dit_sparse.processors.op import register_site
from dit_sparse.processors.rewrap import rewrap, site_of
from dit_sparse.processors.run import Run

HOOK = "dit_sparse"


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
        run = binding.run
        branch = run.enter(
            self.index, timestep, layout, binding.total_steps(), (q.shape[0], q.dtype, q.device)
        )
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


class _ContextListener(StateManager):
    """Hears what a pipeline tells through ``cache_context``: branch and, in newer ones, step.

    diffusers writes the context into every StateManager of every stateful hook. Versions before
    CacheContext passed the bare name.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(BaseState)
        self.run = run

    def set_context(self, context: Any) -> None:
        self.run.context = _NamedContext(context) if isinstance(context, str) else context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.run.end_generation()


class _NamedContext:
    def __init__(self, name: str) -> None:
        self.name = name


class _GenerationHook(ModelHook):
    """Carries the listener; diffusers resets stateful hooks at the end of each pipeline call."""

    _is_stateful = True

    def __init__(self, binding: Binding) -> None:
        super().__init__()
        self.binding = binding
        self.state_manager = _ContextListener(binding.run)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state_manager.reset()
        return module


class _ForwardReader:
    """Root forward-pre-hook: notes the timestep and the token layout of this pass.

    A torch hook and not a diffusers one, because accelerate's offload drops the latter's wrapper.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        parameters = inspect.signature(type(binding.model).forward).parameters
        self.names = tuple(parameters)[1:]

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        layout = self.binding.family.layout(model, arguments)
        scope = self.binding.scope
        scope.timestep = arguments.get("timestep")
        scope.layout = [*layout.grid, layout.text, int(layout.order == "text_video")]


class Binding:
    """Sparse attention on one model: its sites, its state, and the way back.

    Args:
        model: A transformer with a family adapter.
        config: What to compute.
        pipeline: The pipeline around it, if known: its scheduler tells the number of steps.
        owner: The SparseProcessor that makes it.

    Raises:
        ValueError: If the model has no adapter, is already bound, or a dense layer does not exist.
        NotImplementedError: If a processor cannot be wrapped or the model runs ring attention.
    """

    def __init__(
        self, model: Any, config: SparseConfig, pipeline: Any = None, owner: Any = None
    ) -> None:
        self._owner = weakref.ref(owner) if owner is not None else None
        self.model = model
        self.config = config
        self.family = family_of(model)
        self.scope = Scope()
        self.run = Run()
        self._pipeline = weakref.ref(pipeline) if pipeline is not None else None
        modules = self.family.sites(model)
        _check_bindable(model, modules, config)
        self.sites = [
            Site(self, index, name, module, module.processor)
            for index, (name, module) in enumerate(modules)
        ]
        # All processors are made before the first is set: a refusal leaves the model untouched.
        processors = [rewrap(site.original, site) for site in self.sites]
        for site, processor in zip(self.sites, processors, strict=True):
            site.module.set_processor(processor)
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.register_hook(_GenerationHook(self), HOOK)
        self._reader = model.register_forward_pre_hook(_ForwardReader(self), with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied with the model; a copy learns its steps elsewhere.
        return {**vars(self), "_pipeline": None, "_owner": None}

    @property
    def owner(self) -> Any:
        """The SparseProcessor that made this, if it is still alive."""
        return self._owner() if self._owner is not None else None

    def remove(self) -> None:
        """Puts the original processor objects back and removes both hooks. Idempotent."""
        for site in self.sites:
            if site_of(site.module.processor) is site:
                backend = getattr(site.module.processor, "_attention_backend", None)
                if hasattr(site.original, "_attention_backend"):
                    # set_attention_backend may have been called while we were here.
                    site.original._attention_backend = backend
                site.module.set_processor(site.original)
        registry = HookRegistry.check_if_exists_or_initialize(self.model)
        if registry.get_hook(HOOK) is not None:
            registry.remove_hook(HOOK, recurse=False)
        self._reader.remove()
        self.run.end_generation()

    def is_active(self) -> bool:
        """Whether any site still holds our processor."""
        return any(site_of(site.module.processor) is site for site in self.sites)

    def total_steps(self) -> int | None:
        """Steps of the current generation, where the pipeline is known."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        return None if timesteps is None else len(timesteps)


def binding_of(model: nn.Module) -> Binding | None:
    """The sparse attention on ``model``, even if its processors have been replaced since."""
    registry = getattr(model, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK) if registry is not None else None
    return hook.binding if hook is not None else None


def _check_bindable(model: Any, modules: list[tuple[str, Any]], config: SparseConfig) -> None:
    bound = [name for name, module in modules if site_of(module.processor) is not None]
    if bound:
        raise ValueError(
            f"sparse attention is already on this {type(model).__name__} ({bound[0]}, ...); "
            "remove it first"
        )
    absent = [layer for layer in config.dense_layers if layer >= len(modules)]
    if absent:
        raise ValueError(
            f"dense_layers must be below {len(modules)}, the self-attention layers of this "
            f"{type(model).__name__}; got {absent}"
        )
    parallel = getattr(model, "_parallel_config", None)
    context_parallel = getattr(parallel, "context_parallel_config", None)
    if context_parallel is not None:
        ring = (getattr(context_parallel, "ring_degree", 1) or 1) > 1
        why = (
            "ring attention shows each rank one chunk of the keys at a time, so blocks cannot be "
            "selected over all of them"
            if ring
            else "Ulysses is not supported by this release"
        )
        raise NotImplementedError(f"sparse attention cannot run under context parallelism: {why}")
