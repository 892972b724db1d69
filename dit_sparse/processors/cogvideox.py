"""CogVideoX and CogVideoX 1.5, text-, image- and video-to-video, and ConsisID."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, Split, attention_modules


class CogVideoX(Family):
    """``attn1`` of every block sees [text, video] through one set of projections.

    Mirrors ``CogVideoXTransformer3DModel.forward`` of diffusers 0.42.1: latents are ``[batch,
    frames, channels, height, width]``, and only 1.5 has a temporal patch. ConsisID's face
    cross-attention is left alone.
    """

    models = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    tokens = "text, video"
    splits: ClassVar[Mapping[str, Split]] = {"CogVideoXTransformer3DModel": "text first"}

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def parallel_plan(self, model: Any) -> dict[str, Any] | None:
        tokens = ContextParallelInput(split_dim=1, expected_dims=3)
        angles = ContextParallelInput(split_dim=0, expected_dims=2)
        return {
            "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "transformer_blocks.*": {"image_rotary_emb": [angles, angles]},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        _, frames, _, height, width = arguments["hidden_states"].shape
        patch = model.config.patch_size
        # CogVideoX 2B and 5B have no temporal patch, ConsisID no such setting.
        temporal = getattr(model.config, "patch_size_t", None) or 1
        grid = (frames // temporal, height // patch, width // patch)
        return TokenLayout.around(grid, before=arguments["encoder_hidden_states"].shape[1])
