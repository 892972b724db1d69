"""Lumina-Next and Lumina 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class LuminaNext(Family):
    """``attn1`` of every block sees the image alone; text stays in ``attn2``.

    Mirrors ``LuminaNextDiT2DModel.forward`` of diffusers 0.42.1. Its mask, square and repeated over
    heads, excludes nothing. Timesteps rise from 0 to 1.
    """

    models = ("LuminaNextDiT2DModel",)
    tokens = "image"
    outer_mask = True

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"layers": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        return TokenLayout(patched_grid(arguments["hidden_states"].shape, (patch, patch)))

    def noise_level(self, timestep: Tensor) -> Tensor:
        return 1 - timestep


class Lumina2(Family):
    """Blocks see [valid text, image, padding]: the image starts where each caption ends.

    Mirrors ``Lumina2Transformer2DModel.forward`` of diffusers 0.42.1, which reads the caption
    lengths from the mask, as is done here. The two refiners are left alone. Timesteps rise from 0
    to 1.
    """

    models = ("Lumina2Transformer2DModel",)
    tokens = "text, image"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"layers": "attn"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (patch, patch))
        lengths = caption_lengths(arguments)
        if len(set(lengths)) == 1:
            return TokenLayout.around(grid, before=lengths[0])
        return TokenLayout.around(grid, after=max(lengths))

    def offsets(self, model: Any, arguments: Arguments) -> list[int]:
        lengths = caption_lengths(arguments)
        return lengths if len(set(lengths)) > 1 else []

    def noise_level(self, timestep: Tensor) -> Tensor:
        return 1 - timestep


def caption_lengths(arguments: Arguments) -> list[int]:
    """Valid text tokens of each batch element."""
    return [int(n) for n in arguments["encoder_attention_mask"].sum(dim=1).tolist()]
