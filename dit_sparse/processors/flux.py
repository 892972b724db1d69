"""FLUX.1 and the models built like it: Chroma, Bria, Fibo, LongCat-Image, Ovis-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from dit_sparse.processors.family import Arguments, PackedFamily, Split, attention_modules
from dit_sparse.processors.positions import image_grid


class Flux(PackedFamily):
    """Dual- and single-stream blocks see [text, image, references].

    Mirrors ``FluxTransformer2DModel.forward`` of diffusers 0.42.1. Latents are packed; ``img_ids``
    holds (image, row, column) of every token, and the references of Kontext follow the image.
    Image prompts (IP-Adapter) attend beside self-attention, which is left alone.
    """

    models: ClassVar[tuple[str, ...]] = (
        "FluxTransformer2DModel",
        "BriaTransformer2DModel",
        "BriaFiboTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    )
    side_calls: ClassVar[tuple[str, ...]] = ("FluxIPAdapterAttnProcessor",)
    splits: ClassVar[Mapping[str, Split]] = {"FluxTransformer2DModel": "text first"}

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(
            model, {"transformer_blocks": "attn", "single_transformer_blocks": "attn"}
        )

    def text(self, model: Any, arguments: Arguments) -> int:
        return arguments["encoder_hidden_states"].shape[1]

    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        ids = arguments["img_ids"]
        return ids[0] if ids.ndim == 3 else ids

    def grid(self, positions: Tensor) -> tuple[tuple[int, int, int], int]:
        return image_grid(positions), 0


class Chroma(Flux):
    """Its mask becomes a square product of token weights, which the pipelines add to the scores."""

    models = ("ChromaTransformer2DModel",)
    outer_mask = True
