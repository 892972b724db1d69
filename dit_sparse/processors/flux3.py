"""FLUX.3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, attention_modules
from dit_sparse.processors.flux import Flux


class Flux3(Flux):
    """Image blocks see the image alone, single-stream blocks [text, image, references].

    Mirrors ``Flux3Transformer2DModel.forward`` of diffusers 0.42.1. Blocks of text and of
    references are left alone.
    """

    models = ("Flux3Transformer2DModel",)
    tokens = "image blocks: image; single-stream blocks: text, image, references"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        image = [
            (f"mode_blocks.image.{i}.attn", block.attn)
            for i, block in enumerate(model.mode_blocks["image"])
        ]
        return image + attention_modules(model, {"single_transformer_blocks": "attn"})

    def encode(self, model: Any, arguments: Arguments) -> tuple[list[int], Tensor | None]:
        numbers, positions = super().encode(model, arguments)
        references = arguments.get("image_cond_hidden_states")
        return [*numbers, 0 if references is None else references.shape[1]], positions

    def decode(self, numbers: Sequence[int], positions: Tensor | None) -> TokenLayout:
        text, references = numbers
        layout = super().decode([text], positions)
        after = layout.text - layout.text_before + references
        return TokenLayout.around(layout.grid, layout.text_before, after)

    def site_layout(self, name: str, layout: TokenLayout) -> TokenLayout:
        return TokenLayout(layout.grid) if name.startswith("mode_blocks") else layout
