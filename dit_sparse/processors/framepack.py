"""Framepack: HunyuanVideo's blocks over a history of frames at three resolutions."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, patched_grid
from dit_sparse.processors.helios import padded_tokens
from dit_sparse.processors.hunyuan_video import HunyuanVideo

# Latent positions of one history token; the coarser embeddings pad the latent up.
HISTORY = {
    "latents_history_4x": (4, 8, 8),
    "latents_history_2x": (2, 4, 4),
    "latents_clean": (1, 2, 2),
}


class Framepack(HunyuanVideo):
    """Blocks see [history 4x, history 2x, clean frames, current video, image, text].

    Mirrors ``HunyuanVideoFramepackTransformer3DModel.forward`` of diffusers 0.42.1. A single video
    has its padded text cut off by the model, which reads its length from the mask; so do we.
    """

    models = ("HunyuanVideoFramepackTransformer3DModel",)
    tokens = "history, video, text"

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch, config = model.config.patch_size, model.config
        hidden_states = arguments["hidden_states"]
        grid = patched_grid(hidden_states.shape, (config.patch_size_t, patch, patch))
        history = sum(
            padded_tokens(arguments[name].shape, size)
            for name, size in HISTORY.items()
            if arguments.get(name) is not None and arguments.get(f"indices_{name}") is not None
        )
        mask = arguments["encoder_attention_mask"]
        image = arguments["image_embeds"].shape[1]
        text = mask.shape[1] if hidden_states.shape[0] > 1 else int(mask.sum())
        return TokenLayout.around(grid, before=history, after=image + text)
