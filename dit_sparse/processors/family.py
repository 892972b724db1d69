"""What has to be known about a model family, and which family a model belongs to."""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from torch import nn

from dit_sparse.layout import TokenLayout


class Family(abc.ABC):
    """The adapter of one model family. A file in this package that defines one is found.

    Attributes:
        models: Names of the transformer classes it covers. Strings, so that nothing is imported.
    """

    models: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def sites(self, model: Any) -> list[tuple[str, Any]]:
        """The main-stack self-attention modules with their names, in execution order."""

    @abc.abstractmethod
    def layout(self, model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
        """The tokens of one forward pass, from the transformer's own forward arguments.

        Reads shapes only: nothing is copied from the device, and torch.compile can trace it.
        """


@lru_cache(maxsize=1)
def list_families() -> dict[str, Family]:
    """The adapter of every supported transformer class, by class name."""
    package = importlib.import_module("dit_sparse.processors")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dit_sparse.processors.{module.name}")
    return {name: kind() for kind in Family.__subclasses__() for name in kind.models}


def find_family(model: nn.Module) -> Family | None:
    """The adapter for ``model`` by its class or a base class of it, or None."""
    families = list_families()
    for kind in type(model).__mro__:
        if kind.__name__ in families:
            return families[kind.__name__]
    return None


def family_of(model: nn.Module) -> Family:
    """The adapter for ``model``.

    Raises:
        ValueError: If its class has none; names the supported ones.
    """
    family = find_family(model)
    if family is None:
        raise ValueError(
            f"sparse attention has no adapter for {type(model).__name__}; supported transformers "
            f"are {sorted(list_families())}"
        )
    return family
