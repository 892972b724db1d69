"""Kandinsky 5 and 6."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class Kandinsky5(Family):
    """Self-attention of the visual blocks sees the video alone, row-major.

    Mirrors ``Kandinsky5Transformer3DModel.forward`` of diffusers 0.42.1: latents are ``[batch,
    frames, height, width, channels]``. Checkpoints for ten seconds are trained with block-sparse
    attention of their own (NABLA), in another token order.
    """

    models = ("Kandinsky5Transformer3DModel",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"visual_transformer_blocks": "self_attention"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        if arguments.get("sparse_params") is not None:
            raise NotImplementedError(
                "this call asks for Kandinsky's own sparse attention (sparse_params); pass None"
            )
        shape = arguments["hidden_states"].shape[1:4]
        return TokenLayout(patched_grid(shape, model.config.patch_size))

    def refusal(self, model: Any) -> str | None:
        if model.config.attention_type == "nabla":
            return (
                "its attention_type is 'nabla': it is trained for, and computes, a block-sparse "
                "attention of its own"
            )
        return None


class Kandinsky6(Kandinsky5):
    """The video half of the fused blocks; audio and the attention between them are left alone."""

    models = ("Kandinsky6Transformer3DModel",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(
            model, {"visual_transformer_blocks": "video_dec_block.self_attention"}
        )

    def refusal(self, model: Any) -> str | None:
        return None
