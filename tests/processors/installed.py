"""What of diffusers exists in the installed version."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import diffusers
import diffusers.models.transformers as transformers
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, apply_group_offloading, hooks

from dit_sparse.processors.hooks import tells_steps
from dit_sparse.processors.table import transformer_classes

# Newer versions put the name into an object that may tell the step as well.
CacheContext: Any = getattr(hooks, "CacheContext", None)
needs_step_context = pytest.mark.skipif(
    not tells_steps(WanTransformer3DModel),
    reason="this diffusers passes names alone through cache_context",
)


def find(module: str, name: str) -> Any:
    """``name`` of ``module``; skips the test where the installed version lacks it.

    Of ``diffusers.models.transformers`` also classes that it does not export.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pass
    except RuntimeError as error:
        # Some pipelines of older versions import optional packages without asking.
        pytest.skip(f"diffusers {diffusers.__version__} cannot import {name}: {error.__cause__}")
    if module == transformers.__name__ and name in transformer_classes():
        return transformer_classes()[name]
    pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


def set_cache_context(model: Any, context: Any) -> None:
    """What ``model.cache_context`` does on its way in (a context) and out (None)."""
    if CacheContext is not None:
        hooks._set_cache_context(model, context)
    else:
        HookRegistry.check_if_exists_or_initialize(model)._set_context(context)


@functools.cache
def offloads_groups() -> bool:
    """Whether group offload runs here: older versions ask for the type of the accelerator."""
    cpu = torch.device("cpu")
    try:
        apply_group_offloading(torch.nn.Linear(1, 1), cpu, cpu, offload_type="leaf_level")
    except AttributeError:
        return False
    return True
