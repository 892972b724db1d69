"""Bria Fibo 2."""

from __future__ import annotations

import importlib
from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class BriaFibo2(Family):
    """Layers see [gist of the text, image, references], or the gist last where it has padding.

    Mirrors ``BriaFibo2Transformer2DModel.forward`` of diffusers 0.42.1, which reads the text
    lengths from the mask to choose the number of gist tokens, as is done here.
    """

    models = ("BriaFibo2Transformer2DModel",)
    tokens = "gist, image, references"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"layers": "attention"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        config, text = model.config, arguments["encoder_hidden_states"]
        mask = arguments.get("encoder_attention_mask")
        lengths = [text.shape[2]] * text.shape[0]
        if mask is not None:
            lengths = mask.sum(dim=1).tolist()
        upstream = importlib.import_module(type(model).__module__)
        gists = upstream.compute_gist_count(
            lengths,
            min_gist=config.min_num_gist_tokens,
            max_gist=config.max_num_gist_tokens,
            gist_step=config.gist_step,
            min_text_len=config.gist_min_text_len,
            max_text_len=config.gist_max_text_len,
        )
        patch = (config.patch_size, config.patch_size)
        grid = patched_grid(arguments["hidden_states"].shape, patch)
        references = 0
        for latents in arguments.get("context_latents") or []:
            _, height, width = patched_grid(latents.shape, patch)
            references += height * width
        if min(gists) == max(gists):
            return TokenLayout.around(grid, before=max(gists), after=references)
        return TokenLayout.around(grid, after=references + max(gists))
