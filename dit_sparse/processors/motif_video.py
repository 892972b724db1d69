"""Motif-Video: HunyuanVideo's blocks, and decoder blocks that see the video twice."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, patched_grid
from dit_sparse.processors.hunyuan_video import HunyuanVideo


class MotifVideo(HunyuanVideo):
    """Encoder blocks see [video, text], decoder blocks [video to decode, encoded video].

    Mirrors ``MotifVideoTransformer3DModel.forward`` of diffusers 0.42.1. The two videos of a
    decoder block are one grid of twice the frames. Text cross-attention is left alone.
    """

    models = ("MotifVideoTransformer3DModel",)
    tokens = "video, text; decoder blocks: video, video"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        sites = super().sites(model)
        first = len(sites) - model.num_decoder_layers
        return [
            (f"{name} (decoder)" if i >= first else name, module)
            for i, (name, module) in enumerate(sites)
        ]

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch, config = model.config.patch_size, model.config
        grid = patched_grid(arguments["hidden_states"].shape, (config.patch_size_t, patch, patch))
        text = arguments["encoder_hidden_states"].shape[1]
        image = arguments.get("image_embeds")
        return TokenLayout.around(grid, after=text + (0 if image is None else image.shape[1]))

    def site_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        if not name.endswith("(decoder)"):
            return layout
        frames, height, width = layout.grid
        return TokenLayout((2 * frames, height, width))
