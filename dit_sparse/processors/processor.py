"""``SparseProcessor``: the object that users hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from dit_sparse.config import DEFAULT, SparseConfig
from dit_sparse.methods.base import Method
from dit_sparse.processors.binding import Binding, binding_of
from dit_sparse.processors.checks import check_bindable
from dit_sparse.processors.family import (
    find_family,
    is_refused,
    list_families,
    refusal_of,
)
from dit_sparse.processors.one_liner import patch
from dit_sparse.processors.report import Report, make_report


class SparseProcessor:
    """Sparse self-attention for a diffusers transformer.

    ``pipe.transformer.set_attn_processor(SparseProcessor())`` puts it on the main-stack
    self-attention layers and nowhere else; cross-attention keeps its processors. The originals are
    kept: dense steps run them bit for bit, and :meth:`remove` puts the identical objects back.

    Args:
        config: A method's name (``"adaspa"``), a :class:`Method`, a :class:`SparseConfig`, the path
            of a saved one (``*.json``), or None for the default.
        **options: With a name or None: options of the method or the configuration, e.g.
            ``density=0.1`` or ``strict=True``.

    Raises:
        ValueError: On an unknown name or option, or options beside an object that already has its
            own.

    Example::

        pipe.transformer.set_attn_processor(SparseProcessor("adaspa", sparsity=0.8))
    """

    def __init__(
        self, config: SparseConfig | Method | str | Path | None = None, **options: Any
    ) -> None:
        self.config = _as_config(config, options)
        self.bindings: list[Binding] = []
        self._last_report = make_report([])

    def install(self, model: nn.Module, pipeline: Any = None) -> SparseProcessor:
        """Binds ``model``, replacing any sparse attention that is on it.

        The twin of ``model.set_attn_processor(processor)`` for models without that method.

        Args:
            model: A transformer that has an adapter.
            pipeline: The pipeline around it, whose scheduler tells the number of steps.

        Raises:
            ValueError: If there is no adapter for the model, or a setting does not fit it. The
                model is then as it was.
            NotImplementedError: If the model cannot run it as it is set up.
        """
        model = unwrap_module(model)
        check_bindable(model, self.config)
        release(model, replaced=True)
        self.bindings.append(Binding(model, self.config, pipeline, owner=self))
        return self

    def remove(self) -> None:
        """Restores the identical original processors on every model. Idempotent."""
        if self.bindings:
            self._last_report = self.report()
        for binding in self.bindings:
            binding.remove()
        self.bindings = []

    def reset(self) -> None:
        """Forgets everything kept between steps, as if a new generation began."""
        for binding in self.bindings:
            binding.run.end_generation()

    def report(self) -> Report:
        """What happened in the last generation, over all bound models; also after removal."""
        return make_report(self.bindings) if self.bindings else self._last_report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not an attention processor of a single module: always raises TypeError."""
        raise TypeError(
            "a SparseProcessor stands for the sparse attention of a whole model and was set on a "
            "single attention module; pass it to model.set_attn_processor(), or use "
            "enable_sparse_attention(model)"
        )

    def __enter__(self) -> SparseProcessor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        models = [type(binding.model).__name__ for binding in self.bindings]
        return f"SparseProcessor({self.config.method!r}, on={models})"


def release(model: nn.Module, replaced: bool = False) -> None:
    """Takes sparse attention off ``model``, if there is any; see :meth:`Binding.remove`."""
    binding = binding_of(model)
    if binding is None:
        return
    binding.remove(replaced)
    if binding.owner is not None:
        binding.owner.bindings = [b for b in binding.owner.bindings if b is not binding]


def enable_sparse_attention(
    target: Any, config: SparseConfig | Method | str | Path | None = None, **options: Any
) -> SparseProcessor:
    """Puts sparse attention on a transformer, or on every supported transformer of a pipeline.

    Args:
        target: A transformer, or a diffusers pipeline; both experts of Wan 2.2 are bound.
        config: As for :class:`SparseProcessor`.
        **options: As for :class:`SparseProcessor`.

    Returns:
        The processor: ``report()``, ``remove()``, and a context manager that removes at its end.

    Raises:
        ValueError: If nothing in ``target`` is supported, or a setting is wrong.
    """
    processor = SparseProcessor(config, **options)
    if isinstance(target, nn.Module):
        return processor.install(target)
    models = [model for model in _modules(target) if find_family(model) is not None]
    if not models:
        for model in _modules(target):
            if is_refused(model):
                raise ValueError(refusal_of(model))
        raise ValueError(
            f"no component of this {type(target).__name__} has an adapter; supported transformers "
            f"are {sorted(list_families())}, its components are "
            f"{sorted(type(c).__name__ for c in target.components.values() if c is not None)}"
        )
    try:
        for model in models:
            processor.install(model, target)
    except Exception:
        # One expert of two would be worse than none.
        processor.remove()
        raise
    return processor


def disable_sparse_attention(target: Any) -> None:
    """Restores the original processors, wherever sparse attention was put on from.

    Args:
        target: A transformer or a diffusers pipeline; without sparse attention nothing happens.

    Raises:
        ValueError: If it is neither.
    """
    for model in [target] if isinstance(target, nn.Module) else _modules(target):
        release(unwrap_module(model))


def _modules(pipeline: Any) -> Iterator[nn.Module]:
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise ValueError(
            f"expected a diffusers pipeline or transformer, got {type(pipeline).__name__}"
        )
    for component in components.values():
        if isinstance(component, nn.Module):
            yield unwrap_module(component)


def _as_config(config: Any, options: dict[str, Any]) -> SparseConfig:
    if config is None:
        return SparseConfig.from_name(DEFAULT.name, **options)
    if isinstance(config, str) and not config.endswith(".json"):
        return SparseConfig.from_name(config, **options)
    if options:
        raise ValueError(
            f"options {sorted(options)} go with a method name; {type(config).__name__} already "
            "holds its own settings"
        )
    if isinstance(config, str | Path):
        return SparseConfig.load(config)
    if isinstance(config, Method):
        return SparseConfig(method=config)
    if isinstance(config, SparseConfig):
        return config
    raise ValueError(
        "config must be a method name, a Method, a SparseConfig, a path to one or None, got "
        f"{config!r}"
    )


# Whoever can name SparseProcessor may pass it to set_attn_processor, and Python looks that method
# up before it makes the argument.
patch(SparseProcessor, release)
