"""ERNIE-Image."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class ErnieImage(Family):
    """Layers see [image, text]; a mask marks padded text.

    Mirrors ``ErnieImageTransformer2DModel.forward`` of diffusers 0.42.1.
    """

    models = ("ErnieImageTransformer2DModel",)
    tokens = "image, text"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"layers": "self_attention"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (patch, patch))
        return TokenLayout.around(grid, after=arguments["text_bth"].shape[1])
