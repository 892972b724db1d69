"""PRX and NucleusMoE-Image: queries from the image alone, keys from text and image."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class PRX(Family):
    """Keys are [text, image].

    Mirrors ``PRXTransformer2DModel.forward`` of diffusers 0.42.1.
    """

    models = ("PRXTransformer2DModel",)
    tokens = "text (keys only), image"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"blocks": "attention"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        grid = patched_grid(arguments["hidden_states"].shape, (model.patch_size,) * 2)
        return TokenLayout.around(grid, before=arguments["encoder_hidden_states"].shape[1])

    def unqueried(self, layout: TokenLayout, queries: int) -> tuple[int, int] | None:
        return 0, layout.text


class NucleusMoE(Family):
    """Keys are [image, text]; ``img_shapes`` gives the grid.

    Mirrors ``NucleusMoEImageTransformer2DModel.forward`` of diffusers 0.42.1.
    """

    models = ("NucleusMoEImageTransformer2DModel",)
    tokens = "image, text (keys only)"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        shapes = arguments["img_shapes"]
        while not isinstance(shapes[0], int):
            shapes = shapes[0]
        frames, height, width = shapes
        text = arguments["encoder_hidden_states"].shape[1]
        return TokenLayout.around((frames, height, width), after=text)

    def unqueried(self, layout: TokenLayout, queries: int) -> tuple[int, int] | None:
        return layout.video, layout.text
