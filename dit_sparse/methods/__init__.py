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
    found: dict[str, type[Method]] = {}
    for kind in _concrete(Method):  # type: ignore[type-abstract]
        if found.setdefault(kind.name, kind) is not kind:
            raise TypeError(
                f"{kind.__qualname__} and {found[kind.name].__qualname__} are both called "
                f"{kind.name!r}; give each method its own name"
            )
    return found


def _concrete(kind: type[Method]) -> list[type[Method]]:
    below = [leaf for child in kind.__subclasses__() for leaf in _concrete(child)]
    return below if getattr(kind, "__abstractmethods__", None) else [kind, *below]


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
