"""EasyAnimate."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class EasyAnimate(Family):
    """``attn1`` of every block sees [text, T5 text, video].

    Mirrors ``EasyAnimateTransformer3DModel.forward`` of diffusers 0.42.1.
    """

    models = ("EasyAnimateTransformer3DModel",)
    tokens = "text, video"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (1, patch, patch))
        texts = (arguments.get(n) for n in ("encoder_hidden_states", "encoder_hidden_states_t5"))
        return TokenLayout.around(grid, before=sum(t.shape[1] for t in texts if t is not None))
