"""AnyFlow, Wan's blocks with latents in frames-first order."""

from __future__ import annotations

from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, patched_grid
from dit_sparse.processors.wan import Wan


class AnyFlow(Wan):
    """``hidden_states`` is ``[batch, frames, channels, height, width]``."""

    models = ("AnyFlowTransformer3DModel",)

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        _, frames, _, height, width = arguments["hidden_states"].shape
        return TokenLayout(patched_grid((frames, height, width), model.config.patch_size))
