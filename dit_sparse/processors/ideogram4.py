"""Ideogram 4."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.processors.family import Arguments, PackedFamily, attention_modules
from dit_sparse.processors.positions import trailing_video_grid


class Ideogram4(PackedFamily):
    """Blocks see [padding, text, image] as one packed sequence.

    Mirrors ``Ideogram4Transformer2DModel.forward`` of diffusers 0.42.1. Its square mask lets tokens
    of one segment see each other; padding is a segment of its own. Timesteps rise from 0 to 1.
    """

    models = ("Ideogram4Transformer2DModel",)
    tokens = "text, image"
    outer_mask = True

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"layers": "attention"})

    def text(self, model: Any, arguments: Arguments) -> int:
        return 0

    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        return arguments["position_ids"][0]

    def grid(self, positions: Tensor) -> tuple[tuple[int, int, int], int]:
        grid = trailing_video_grid(positions)
        return grid, positions.shape[0] - grid[0] * grid[1] * grid[2]

    def noise_level(self, timestep: Tensor) -> Tensor:
        return 1 - timestep
