"""Which model a transformer is, as far as plans made for one model need to know."""

from __future__ import annotations

import json
from typing import Any

from dit_sparse.methods.base import ModelIdentity


def identify(model: Any, pipeline: Any = None) -> ModelIdentity:
    """Class, configuration and, with ``pipeline``, component name of ``model``.

    Keys of the configuration that begin with an underscore (paths, versions) do not count.
    """
    items = dict(getattr(model, "config", {}) or {})
    config = tuple(
        (key, json.dumps(items[key], sort_keys=True, default=str))
        for key in sorted(items)
        if not key.startswith("_")
    )
    components = getattr(pipeline, "components", {})
    names = [name for name, component in components.items() if component is model]
    return ModelIdentity(type(model).__name__, config, names[0] if names else "")
