"""CogView3-Plus, CogView4 and GLM-Image."""

from __future__ import annotations

from typing import Any, ClassVar

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class CogView(Family):
    """``attn1`` of every block sees [text, image] through one set of projections.

    Mirrors the forward functions of diffusers 0.42.1. A text mask becomes a square floating-point
    matrix there, added to the scores.
    """

    models: ClassVar[tuple[str, ...]] = (
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
    )
    tokens = "text, image"
    outer_mask = True

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (patch, patch))
        return TokenLayout.around(grid, before=arguments["encoder_hidden_states"].shape[1])


class GlmImage(CogView):
    """Editing puts keys of the condition images, kept from a pass of their own, in front."""

    models = ("GlmImageTransformer2DModel",)
    tokens = "references (keys only), text, image"

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        layout = super().layout(model, arguments)
        caches = arguments.get("kv_caches")
        cache = caches[0] if caches is not None else None
        if cache is None or cache.mode != "read" or not cache.k_caches:
            return layout
        references = cache.k_caches[0].shape[1]
        return TokenLayout.around(layout.grid, before=references + layout.text)

    def unqueried(self, layout: TokenLayout, queries: int) -> tuple[int, int] | None:
        return 0, layout.tokens - queries
