"""What is computed: one paper a file. Every file here that defines a ``Method`` is found."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import lru_cache

from dit_sparse.methods.base import Method


@lru_cache(maxsize=1)
def list_methods() -> dict[str, type[Method]]:
    """All methods by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {kind.name: kind for kind in _leaves(Method)}  # type: ignore[type-abstract]


def _leaves(kind: type[Method]) -> list[type[Method]]:
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in _leaves(child)] if children else [kind]


def method_class(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        ValueError: If there is none; names the known ones and the closest.
    """
    known = list_methods()
    if name not in known:
        close = get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method must be one of {sorted(known)}, got {name!r}.{hint}")
    return known[name]


__all__ = ["Method", "list_methods", "method_class"]
