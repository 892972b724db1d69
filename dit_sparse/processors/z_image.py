"""Z-Image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid

# The model pads images and captions to a multiple of this, with tokens that take part.
MULTIPLE = 32


class ZImage(Family):
    """The unified layers see [image, its padding, text, its padding].

    Mirrors ``ZImageTransformer2DModel.forward`` of diffusers 0.42.1 with one image a sample. The
    refiners of image and text are left alone. Timesteps rise from 0 to 1.
    """

    models = ("ZImageTransformer2DModel",)
    tokens = "image, padding, text"
    timestep_name = "t"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"layers": "attention"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        images = arguments["x"]
        shapes = {None if isinstance(image, list) else tuple(image.shape) for image in images}
        if len(shapes) > 1 or None in shapes:
            raise NotImplementedError(
                "sparse attention on Z-Image takes one image a sample, all of one size; references "
                "and mixed sizes have no common token grid"
            )
        patch = arguments.get("patch_size") or 2
        temporal = arguments.get("f_patch_size") or 1
        grid = patched_grid(images[0].shape, (temporal, patch, patch))
        longest = max(padded(len(caption)) for caption in arguments["cap_feats"])
        image = grid[0] * grid[1] * grid[2]
        return TokenLayout.around(grid, after=padded(image) - image + longest)

    def noise_level(self, timestep: Tensor) -> Tensor:
        return 1 - timestep


def padded(tokens: int) -> int:
    """``tokens`` rounded up to a multiple of 32."""
    return -(-tokens // MULTIPLE) * MULTIPLE
