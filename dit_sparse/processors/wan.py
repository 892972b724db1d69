"""Wan 2.1 and 2.2, text- and image-to-video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Family


class Wan(Family):
    """``attn1`` of every block sees the video alone, row-major; text and image stay in ``attn2``.

    Mirrors ``WanTransformer3DModel.forward`` of diffusers 0.42.1: the grid is the latent shape over
    ``patch_size``.
    """

    models = ("WanTransformer3DModel",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return [(f"blocks.{i}.attn1", block.attn1) for i, block in enumerate(model.blocks)]

    def layout(self, model: Any, arguments: Mapping[str, Any]) -> TokenLayout:
        frames, height, width = arguments["hidden_states"].shape[-3:]
        patch = model.config.patch_size
        return TokenLayout((frames // patch[0], height // patch[1], width // patch[2]))
