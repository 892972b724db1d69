"""Qwen-Image and its editing and layered variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, Split, attention_modules


class QwenImage(Family):
    """Blocks see [text, image, references]; a mask marks padded text.

    Mirrors ``QwenImageTransformer2DModel.forward`` of diffusers 0.42.1: ``img_shapes`` lists
    (frames, height, width) of the image and its references, in tokens. The layers of the layered
    variant, all of one size, are the frames of one grid; its last image is the reference.
    """

    models = ("QwenImageTransformer2DModel",)
    tokens = "text, image, references"
    splits: ClassVar[Mapping[str, Split]] = {"QwenImageTransformer2DModel": "text first"}

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        shapes = arguments["img_shapes"]
        # One list a sample, or one shape a sample in older pipelines.
        first = shapes[0] if isinstance(shapes, list) else shapes
        images = first if isinstance(first, list) else [first]
        frames, height, width = images[0]
        layers = len(images) - 1 if model.config.get("use_layer3d_rope") else 1
        frames *= layers
        references = sum(math.prod(shape) for shape in images[layers:])
        text = arguments["encoder_hidden_states"].shape[1]
        return TokenLayout.around((frames, height, width), before=text, after=references)
