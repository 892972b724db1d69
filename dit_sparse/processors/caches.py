"""Step caches of diffusers that do not do what was asked, which nothing else would tell.

All cases below are the same without sparse attention. Here they would be taken for its doing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffusers.hooks.hooks import ModelHook, StateManager
from torch import nn

from dit_sparse.processors.run import Run

# Caches that skip by how far the tokens at hand have moved, and not by the step alone.
BY_TOKENS = ("FirstBlockCacheConfig", "SeaCacheConfig")


def cache_hooks(model: nn.Module) -> list[ModelHook]:
    """The hooks that a step cache of diffusers has put on ``model`` and its modules."""
    hooks = []
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            if hook._is_stateful and type(hook).__module__.startswith("diffusers."):
                hooks.append(hook)
    return hooks


class CacheCheck:
    """Looks at the step cache of one model.

    Args:
        model: The model.
        sites: Names of its self-attention modules.
    """

    def __init__(self, model: Any, sites: Sequence[str]) -> None:
        self.model = model
        self.sites = sites
        self._config: Any = None
        self._hooks: list[ModelHook] = []

    def problem(self, run: Run, is_split: bool) -> str | None:
        """What is wrong with the cache that is enabled now, or None.

        Args:
            run: The passes of the generation so far.
            is_split: Whether the sequence is split over devices.
        """
        config = getattr(self.model, "_cache_config", None)
        if config is not self._config:
            # Modules are gone through once for each cache, and not in every pass.
            self._config = config
            self._hooks = cache_hooks(self.model) if config is not None else []
        if config is None:
            return None
        kind, model = type(config).__name__, type(self.model).__name__
        if not self._hooks:
            stacks = dict.fromkeys(re.sub(r"\.\d+\.", r"\\.\\d+\\.", name) for name in self.sites)
            names = ", ".join(f'r"{stack}"' for stack in stacks)
            return (
                f"{kind} is enabled on this {model} and caches nothing: its identifiers match no "
                f"module. Disable it and enable it with cache_identifiers=[{names}]"
            )
        if is_split and kind in BY_TOKENS:
            return (
                f"{kind} decides on each device by that device's tokens whether to skip: where "
                f"devices of this {model} decide differently, attention mixes up steps or waits "
                "forever. Under context parallelism use a cache that goes by the step, e.g. "
                "MagCacheConfig or TaylorSeerCacheConfig"
            )
        if len(run.branches) > 1 and not all(keeps_branches_apart(h) for h in self._hooks):
            passes = ", ".join(run.branches)
            return (
                f"{kind} does not tell the passes of one step apart ({passes}): on this {model} "
                "the second one gets the attention output of the first. Use another cache, or "
                "turn guidance off"
            )
        return None


def keeps_branches_apart(hook: ModelHook) -> bool:
    """Whether a cache hook keeps a state for each name that ``cache_context`` is given."""
    return any(isinstance(value, StateManager) for value in vars(hook).values())
