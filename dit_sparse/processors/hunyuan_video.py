"""HunyuanVideo: dual-stream blocks, then single-stream blocks, video first and text last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, Split, attention_modules, patched_grid


class HunyuanVideo(Family):
    """Both kinds of block see [video, text]; the mask ``[batch, 1, 1, tokens]`` marks padded text.

    Mirrors ``HunyuanVideoTransformer3DModel.forward`` of diffusers 0.42.1. The token refiner of
    the text embedder attends over text alone and is left alone. Image-to-video puts its image
    tokens into the text.
    """

    models = ("HunyuanVideoTransformer3DModel",)
    tokens = "video, text"
    splits: ClassVar[Mapping[str, Split]] = {"HunyuanVideoTransformer3DModel": "text last"}

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(
            model, {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}
        )

    def parallel_plan(self, model: Any) -> dict[str, Any] | None:
        if model.config.image_condition_type == "token_replace":
            # Blocks modulate the tokens of the first frame by their places in the sequence.
            return None
        tokens = ContextParallelInput(split_dim=1, expected_dims=3)
        angles = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
        # The padding mask stays whole: it is made of both streams, in the model's order.
        return {
            "rope": {0: angles, 1: angles},
            "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch, config = model.config.patch_size, model.config
        grid = patched_grid(arguments["hidden_states"].shape, (config.patch_size_t, patch, patch))
        return TokenLayout.around(grid, after=arguments["encoder_hidden_states"].shape[1])
