"""Allegro."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class Allegro(Family):
    """``attn1`` of every block sees the video alone; a padding mask over it is possible.

    Mirrors ``AllegroTransformer3DModel.forward`` of diffusers 0.42.1.
    """

    models = ("AllegroTransformer3DModel",)
    penalty_mask = True

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch, config = model.config.patch_size, model.config
        return TokenLayout(
            patched_grid(arguments["hidden_states"].shape, (config.patch_size_t, patch, patch))
        )
