"""SkyReels-V2, text- and image-to-video, with and without diffusion forcing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.processors.wan import Wan


class SkyReels(Wan):
    """Wan's blocks and grid. Diffusion forcing gives each frame a noise level of its own."""

    models = ("SkyReelsV2Transformer3DModel",)

    def noise_level(self, timestep: Tensor) -> Tensor:
        # Asynchronous schedules keep the last frame at full noise for many steps; the mean falls.
        return timestep.float().mean() if timestep.ndim == 2 else timestep

    def refusal(self, model: Any) -> str | None:
        if model.config.num_frame_per_block > 1:
            return (
                "with num_frame_per_block > 1 its self-attention is causal over blocks of frames; "
                "set it to 1 for bidirectional attention"
            )
        return None
