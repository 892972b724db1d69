"""Wan 2.1 and 2.2 with their relatives: VACE, Animate, ChronoEdit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import (
    Arguments,
    Family,
    Split,
    attention_modules,
    patched_grid,
)


class Wan(Family):
    """``attn1`` of every block sees the video alone, row-major; text and image stay in ``attn2``.

    Mirrors ``WanTransformer3DModel.forward`` of diffusers 0.42.1: the grid is the latent shape over
    ``patch_size``. Animate's reference frame is the first frame of the latent; its face adapter
    is left alone.
    """

    models: ClassVar[tuple[str, ...]] = (
        "WanTransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    )
    splits: ClassVar[Mapping[str, Split]] = {
        "WanTransformer3DModel": "whole",
        "ChronoEditTransformer3DModel": "whole",
    }

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        return TokenLayout(patched_grid(arguments["hidden_states"].shape, model.config.patch_size))


class WanVACE(Wan):
    """The control stack runs first, over the same grid."""

    models = ("WanVACETransformer3DModel",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"vace_blocks": "attn1", "blocks": "attn1"})
