"""PixArt-alpha and -sigma, and DiT."""

from __future__ import annotations

from typing import Any, ClassVar

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class PixArt(Family):
    """``attn1`` of every block sees the image alone; text stays in ``attn2``.

    Mirrors the forward functions of diffusers 0.42.1.
    """

    models: ClassVar[tuple[str, ...]] = ("PixArtTransformer2DModel", "DiTTransformer2DModel")
    tokens = "image"
    penalty_mask = True

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        return TokenLayout(patched_grid(arguments["hidden_states"].shape, (patch, patch)))
