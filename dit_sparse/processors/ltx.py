"""LTX-Video and LTX-2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import (
    Arguments,
    Family,
    PackedFamily,
    Split,
    attention_modules,
)
from dit_sparse.processors.positions import leading_video_grid, trailing_video_grid


class LTX(PackedFamily):
    """``attn1`` of every block sees [conditioning frames, video].

    Mirrors ``LTXVideoTransformer3DModel.forward`` of diffusers 0.42.1. Latents are packed. Most
    pipelines say how many latent frames, rows and columns there are; the conditioning pipeline
    gives the coordinates of every token instead.
    """

    models = ("LTXVideoTransformer3DModel",)
    tokens = "conditioning frames, video"
    # Not LTX-2: the plan of diffusers 0.42 splits its video but not the angles for attention to the
    # audio.
    splits: ClassVar[Mapping[str, Split]] = {"LTXVideoTransformer3DModel": "whole"}

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def text(self, model: Any, arguments: Arguments) -> int:
        return 0

    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        return arguments["video_coords"][0].T

    def grid(self, positions: Tensor) -> tuple[tuple[int, int, int], int]:
        grid = trailing_video_grid(positions)
        return grid, positions.shape[0] - grid[0] * grid[1] * grid[2]

    def encode(self, model: Any, arguments: Arguments) -> tuple[list[int], Tensor | None]:
        sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
        if None in sizes:
            return super().encode(model, arguments)
        config = model.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        frames, height, width = (n // p for n, p in zip(sizes, patch, strict=True))
        extra = arguments["hidden_states"].shape[1] - frames * height * width
        return [frames, height, width, *self.sides(extra)], None

    def decode(self, numbers: Sequence[int], positions: Tensor | None) -> TokenLayout:
        if positions is None:
            return Family.decode(self, numbers, positions)
        return super().decode(numbers, positions)

    def sides(self, extra: int) -> tuple[int, int]:
        """Conditioning tokens before and after the video."""
        return extra, 0


class LTX2(LTX):
    """``attn1`` sees [video, conditioning frames]; audio has attention of its own."""

    models = ("LTX2VideoTransformer3DModel",)
    tokens = "video, conditioning frames"

    def positions(self, model: Any, arguments: Arguments) -> Tensor:
        return arguments["video_coords"][0].transpose(0, 1)

    def grid(self, positions: Tensor) -> tuple[tuple[int, int, int], int]:
        return leading_video_grid(positions), 0

    def sides(self, extra: int) -> tuple[int, int]:
        return 0, extra
