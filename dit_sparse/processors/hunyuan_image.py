"""HunyuanImage 2.1: HunyuanVideo's blocks on one image."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, patched_grid
from dit_sparse.processors.hunyuan_video import HunyuanVideo


class HunyuanImage(HunyuanVideo):
    """Blocks see [image, text]; the glyph text joins the prompt and both are sorted valid first.

    Mirrors ``HunyuanImageTransformer2DModel.forward`` of diffusers 0.42.1.
    """

    models = ("HunyuanImageTransformer2DModel",)
    tokens = "image, text"

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        hidden_states = arguments["hidden_states"]
        text = arguments["encoder_hidden_states"].shape[1]
        glyphs = arguments.get("encoder_hidden_states_2")
        if glyphs is not None and model.context_embedder_2 is not None:
            text += glyphs.shape[1]
        grid = patched_grid(hidden_states.shape, model.config.patch_size)
        return TokenLayout.around(grid, after=text)
