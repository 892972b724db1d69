"""Krea 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.processors.family import Arguments, attention_modules
from dit_sparse.processors.flux import Flux


class Krea2(Flux):
    """Blocks see [text, image]; ``position_ids`` describes both.

    Mirrors ``Krea2Transformer2DModel.forward`` of diffusers 0.42.1. The fusion of text layers has
    attention of its own, which is left alone.
    """

    models = ("Krea2Transformer2DModel",)
    tokens = "text, image"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn"})

    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        return arguments["position_ids"][self.text(model, arguments) :]
