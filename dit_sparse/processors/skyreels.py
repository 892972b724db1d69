"""SkyReels-V2, text- and image-to-video, with and without diffusion forcing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.processors.wan import Wan


class SkyReels(Wan):
    """Wan's blocks and grid. Diffusion forcing gives each frame a noise level of its own."""

    models = ("SkyReelsV2Transformer3DModel",)

    def noise_level(self, timestep: Tensor) -> Tensor:
        if timestep.ndim < 2:
            return timestep
        # Asynchronous schedules keep the last frame at full noise for many steps, in which the mean
        # falls; the next window of a long video begins with clean frames and a low mean, but with
        # the largest value again. Together they fall in every window and rise between windows.
        levels = timestep.float()
        return levels.max() + levels.mean() / 1000

    def refusal(self, model: Any) -> str | None:
        if model.config.num_frame_per_block > 1:
            return (
                "with num_frame_per_block > 1 its self-attention is causal over blocks of frames; "
                "set it to 1 for bidirectional attention"
            )
        return None
