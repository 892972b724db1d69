"""JoyImage-Edit and JoyImage-Edit-Plus."""

from __future__ import annotations

import math
from typing import Any

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid


class JoyImageEdit(Family):
    """Blocks see [image, references, text].

    Mirrors ``JoyImageEditTransformer3DModel.forward`` of diffusers 0.42.1: items ``[batch, items,
    channels, frames, height, width]`` of one size, of which the last, the image, is moved to the
    front.
    """

    models = ("JoyImageEditTransformer3DModel",)
    tokens = "image, references, text"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"double_blocks": "attn"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        hidden_states = arguments["hidden_states"]
        grid = patched_grid(hidden_states.shape, model.config.patch_size)
        references = hidden_states.shape[1] - 1 if hidden_states.ndim == 6 else 0
        text = arguments["encoder_hidden_states"].shape[1]
        return TokenLayout.around(grid, after=references * math.prod(grid) + text)


class JoyImageEditPlus(JoyImageEdit):
    """Patches come packed and padded; ``shape_list`` gives the size of each item, image first."""

    models = ("JoyImageEditPlusTransformer3DModel",)
    tokens = "image, references, padding, text"

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        grids = {tuple(int(n) for n in shapes[0]) for shapes in arguments["shape_list"]}
        if len(grids) > 1:
            raise NotImplementedError(
                f"sparse attention takes batches of images of one size, got grids {sorted(grids)}"
            )
        frames, height, width = grids.pop()
        rest = arguments["hidden_states"].shape[1] - frames * height * width
        text = arguments["encoder_hidden_states"].shape[1]
        return TokenLayout.around((frames, height, width), after=rest + text)
