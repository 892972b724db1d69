"""Hunyuan-DiT."""

from __future__ import annotations

from typing import Any

from dit_sparse.processors.family import attention_modules
from dit_sparse.processors.pixart import PixArt


class HunyuanDiT(PixArt):
    """``attn1`` of every block sees the image alone; text stays in ``attn2``.

    Mirrors ``HunyuanDiT2DModel.forward`` of diffusers 0.42.1.
    """

    models = ("HunyuanDiT2DModel",)

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"blocks": "attn1"})
