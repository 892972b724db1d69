"""Helios: the current chunk of a video behind its history at three resolutions."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid

# Latent positions of one history token; the coarser embeddings pad the latent up.
HISTORY = {"long": (4, 8, 8), "mid": (2, 4, 4), "short": (1, 2, 2)}


class Helios(Family):
    """``attn1`` sees [history long, mid, short, current]; only the current chunk is a grid.

    Mirrors ``HeliosTransformer3DModel.forward`` of diffusers 0.42.1. History tokens lie on other
    grids and stay exact.
    """

    models = ("HeliosTransformer3DModel",)
    tokens = "history, video"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        history = 0
        for name, patch in HISTORY.items():
            latents = arguments.get(f"latents_history_{name}")
            indices = arguments.get(f"indices_latents_history_{name}")
            if latents is not None and indices is not None:
                history += padded_tokens(latents.shape, patch)
        grid = patched_grid(arguments["hidden_states"].shape, model.config.patch_size)
        return TokenLayout.around(grid, before=history)


def padded_tokens(shape: Any, patch: tuple[int, int, int]) -> int:
    """Tokens of a latent ``[..., frames, height, width]`` padded up to whole patches."""
    frames, height, width = (-(-int(n) // p) for n, p in zip(shape[-3:], patch, strict=True))
    return frames * height * width
