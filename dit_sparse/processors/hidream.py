"""HiDream-I1."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class HiDream(Family):
    """Double- and single-stream blocks see [image, T5 text, last Llama layer, own Llama layer].

    Mirrors ``HiDreamImageTransformer2DModel.forward`` of diffusers 0.42.1. Images that are not
    square are padded to the largest size with tokens that take part; they count as text here.
    """

    models = ("HiDreamImageTransformer2DModel",)
    tokens = "image, padding, text"
    timestep_name = "timesteps"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(
            model, {"double_stream_blocks": "block.attn1", "single_stream_blocks": "block.attn1"}
        )

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        hidden_states, patch = arguments["hidden_states"], model.config.patch_size
        if arguments.get("hidden_states_masks") is not None:
            raise NotImplementedError(
                "sparse attention on HiDream takes latents [batch, channels, height, width], not "
                "packed ones with hidden_states_masks"
            )
        grid = patched_grid(hidden_states.shape, (patch, patch))
        image = grid[1] * grid[2]
        square = hidden_states.shape[-2] == hidden_states.shape[-1]
        padding = 0 if square else model.max_seq - image
        llama = arguments["encoder_hidden_states_llama3"].shape[2]
        text = arguments["encoder_hidden_states_t5"].shape[1] + 2 * llama
        return TokenLayout.around(grid, after=padding + text)
