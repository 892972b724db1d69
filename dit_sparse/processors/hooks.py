"""What a bound model is listened to through: its forward passes and its pipeline's context."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import (
    BaseState,
    HookFunctionReference,
    HookRegistry,
    ModelHook,
    StateManager,
)
from torch import nn

if TYPE_CHECKING:
    from dit_sparse.processors.binding import Binding
    from dit_sparse.processors.run import Run

HOOK = "dit_sparse"


class _ContextListener(StateManager):
    """Hears what a pipeline tells through ``cache_context``: branch and, in newer ones, step.

    diffusers writes the context into every StateManager of every stateful hook. Versions before
    CacheContext passed the bare name; see :func:`tells_steps`.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(BaseState)
        self.run = run

    def set_context(self, context: Any) -> None:
        self.run.context = _NamedContext(context) if isinstance(context, str) else context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.run.end_generation()


def tells_steps(model: Any) -> bool:
    """Whether ``model.cache_context`` takes the step beside the name (diffusers 0.41 and newer)."""
    parameters = inspect.signature(model.cache_context).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


class _NamedContext:
    def __init__(self, name: str) -> None:
        self.name = name


class GenerationHook(ModelHook):
    """Carries the listener; diffusers resets stateful hooks at the end of each pipeline call."""

    _is_stateful = True

    def __init__(self, binding: Binding) -> None:
        super().__init__()
        self.binding = binding
        self.state_manager = _ContextListener(binding.run)

    def reset_state(self, module: nn.Module) -> nn.Module:
        try:
            # A model compiled as a whole is not checked after each of its passes.
            if not self.binding.run.is_idle:
                self.binding.check_alive()
        finally:
            self.state_manager.reset()
        return module


def _listen(model: nn.Module, hook: GenerationHook) -> None:
    # register_hook would also wrap ``forward``, in a closure that a deep copy of the model shares
    # with the original: the copy would compute with the original's weights. Standing first in the
    # registry without a wrapper keeps its chain of wrappers right for hooks that come or go.
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[HOOK] = hook
    registry._hook_order.insert(0, HOOK)
    registry._fn_refs.insert(0, HookFunctionReference())


def _stop_listening(model: nn.Module) -> None:
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if registry.hooks.pop(HOOK, None) is not None:
        index = registry._hook_order.index(HOOK)
        del registry._hook_order[index], registry._fn_refs[index]


def find_generation_hook(model: nn.Module) -> GenerationHook | None:
    """The hook that :class:`ForwardHooks` put on ``model``, if it is there."""
    registry = getattr(model, "_diffusers_hook", None)
    return registry.get_hook(HOOK) if registry is not None else None


class _ForwardReader:
    """Root forward-pre-hook: notes the timestep and the token layout of this pass."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        parameters = inspect.signature(type(binding.model).forward).parameters
        self.names = tuple(parameters)[1:]

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        binding = self.binding
        # Traced by torch 2.9, zip(strict=False) is as strict as zip(strict=True).
        names = self.names[: len(args)]
        arguments = {**dict(zip(names, args, strict=True)), **kwargs}
        family, scope = binding.family, binding.scope
        scope.timestep = family.timestep(arguments)
        numbers, scope.positions = family.encode(model, arguments)
        scope.layout = torch.tensor(numbers)
        if not torch.compiler.is_compiling():
            # Traced, this would happen after the pass and not before it.
            binding.devices()
            binding.run.begin_forward(scope.timestep)


class _ForwardCheck:
    """Root forward-hook: notices where sparse attention was lost. Too late in a traced pass."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.binding.run.finish_forward()
            self.binding.check_alive()


class ForwardHooks:
    """All hooks of one bound model.

    Those around forward are torch's and not diffusers', whose wrappers accelerate's offload drops.
    """

    def __init__(self, binding: Binding) -> None:
        self._model = binding.model
        _listen(binding.model, GenerationHook(binding))
        self._handles = [
            binding.model.register_forward_pre_hook(_ForwardReader(binding), with_kwargs=True),
            binding.model.register_forward_hook(_ForwardCheck(binding)),
        ]

    def remove(self) -> None:
        """Takes every hook off. Idempotent."""
        _stop_listening(self._model)
        for handle in self._handles:
            handle.remove()
