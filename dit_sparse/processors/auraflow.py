"""AuraFlow."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class AuraFlow(Family):
    """Joint and single blocks see [registers, text, image].

    Mirrors ``AuraFlowTransformer2DModel.forward`` of diffusers 0.42.1.
    """

    models = ("AuraFlowTransformer2DModel",)
    tokens = "registers, text, image"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(
            model, {"joint_transformer_blocks": "attn", "single_transformer_blocks": "attn"}
        )

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (patch, patch))
        registers = model.register_tokens.shape[1]
        text = arguments["encoder_hidden_states"].shape[1]
        return TokenLayout.around(grid, before=registers + text)
