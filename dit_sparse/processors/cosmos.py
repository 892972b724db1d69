"""Cosmos Predict 1, 2 and 2.5, and Transfer."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class Cosmos(Family):
    """``attn1`` of every block sees the video alone; text and image stay in ``attn2``.

    Mirrors ``CosmosTransformer3DModel.forward`` of diffusers 0.42.1.
    """

    models = ("CosmosTransformer3DModel",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        return TokenLayout(patched_grid(arguments["hidden_states"].shape, model.config.patch_size))
