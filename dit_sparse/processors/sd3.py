"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, patched_grid


class SD3(Family):
    """``attn`` of every block sees [image, text]; ``attn2`` of 3.5 Medium the image alone.

    Mirrors ``SD3Transformer2DModel.forward`` of diffusers 0.42.1. Image prompts (IP-Adapter) attend
    beside self-attention, which is left alone.
    """

    models = ("SD3Transformer2DModel",)
    tokens = "image, text; attn2: image"
    side_calls = ("SD3IPAdapterJointAttnProcessor2_0",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return [
            (f"transformer_blocks.{i}.{leaf}", getattr(block, leaf))
            for i, block in enumerate(model.transformer_blocks)
            for leaf in ("attn", "attn2")
            if getattr(block, leaf, None) is not None
        ]

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (patch, patch))
        text = arguments.get("encoder_hidden_states")
        return TokenLayout.around(grid, after=0 if text is None else text.shape[1])

    def site_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        return TokenLayout(layout.grid) if name.endswith("attn2") else layout
