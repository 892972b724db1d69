"""MiniMax H3."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.processors.family import Arguments, PackedFamily, attention_modules
from dit_sparse.processors.positions import trailing_video_grid


class MiniMaxH3(PackedFamily):
    """Blocks see [text, reference frames, audio, video] as one packed sequence.

    Mirrors ``MiniMaxH3Transformer3DModel.forward`` of diffusers 0.42.1, in the order in which its
    modular pipeline packs. The refiner of text tokens is left alone.
    """

    models = ("MiniMaxH3Transformer3DModel",)
    tokens = "text, references, audio, video"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn"})

    def text(self, model: Any, arguments: Arguments) -> int:
        return 0

    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        return arguments["position_ids"]

    def grid(self, positions: Tensor) -> tuple[tuple[int, int, int], int]:
        grid = trailing_video_grid(positions)
        return grid, positions.shape[0] - grid[0] * grid[1] * grid[2]
