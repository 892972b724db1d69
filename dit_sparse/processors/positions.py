"""The grid of a packed sequence, from the position ids that the model gets for its tokens.

Packed models see ``[batch, tokens, channels]`` and no height or width: 1024x512 and 512x1024 have
the same shapes. Only the values of the ids tell them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_grid(ids: Tensor) -> tuple[int, int, int]:
    """The grid of the image whose tokens come first.

    Args:
        ids: ``[tokens, 3 or more]``: (image, row, column, ...) of every token, row-major. Reference
            images follow with other values in the first column. Rows and columns may be shifted or
            scaled.

    Returns:
        ``(1, height, width)``.

    Raises:
        ValueError: If the first image is not a full grid.
    """
    _, height, width = _frame(ids.detach().cpu())
    return 1, height, width


def trailing_video_grid(ids: Tensor) -> tuple[int, int, int]:
    """The grid of the video whose tokens come last.

    Args:
        ids: ``[tokens, 3]``: (time, row, column) of every token, row-major. Other tokens may
            precede the video.

    Returns:
        ``(frames, height, width)``.

    Raises:
        ValueError: If the last frame is not a full grid.
    """
    rows = ids.detach().cpu().flip(0)
    frame, height, width = _frame(rows)
    frames = 1
    # Going back, frames continue while time falls and the places stay the same.
    for earlier in rows[frame:].split(frame):
        if (
            len(earlier) < frame
            or not torch.equal(earlier[:, 1:], rows[:frame, 1:])
            or not (earlier[:, 0] < rows[(frames - 1) * frame, 0]).all()
        ):
            break
        frames += 1
    return frames, height, width


def leading_video_grid(spans: Tensor) -> tuple[int, int, int]:
    """The grid of the video whose tokens come first.

    Args:
        spans: ``[tokens, 3, 2]``: begin and end of every token along (time, row, column),
            row-major. A frame begins where the one before it ends; other tokens may follow.

    Returns:
        ``(frames, height, width)``.

    Raises:
        ValueError: If the first frame is not a full grid.
    """
    rows = spans.detach().cpu()
    frame, height, width = _frame(rows[..., 0])
    frames = 1
    for later in rows[frame:].split(frame):
        if (
            len(later) < frame
            or not torch.equal(later[:, 1:], rows[:frame, 1:])
            or not (later[:, 0, 0] == rows[(frames - 1) * frame, 0, 1]).all()
        ):
            break
        frames += 1
    return frames, height, width


def _frame(rows: Tensor) -> tuple[int, int, int]:
    """Tokens, height and width of the frame that the first token belongs to."""
    frame = _run(rows[:, 0])
    width = _run(rows[:frame, 1])
    _check_grid(rows[:frame, 1:3], frame // width, width)
    return frame, frame // width, width


def _run(values: Tensor) -> int:
    """How many values from the first on are equal to it."""
    other = (values != values[0]).nonzero()
    return int(other[0]) if len(other) else len(values)


def _check_grid(places: Tensor, height: int, width: int) -> None:
    tiled = places.view(height, width, 2) if height * width == len(places) else None
    if (
        tiled is None
        or not (tiled[:, :, 0] == tiled[:, :1, 0]).all()
        or not (tiled[:, :, 1] == tiled[:1, :, 1]).all()
    ):
        raise ValueError(
            f"the position ids of {len(places)} image tokens are not a row-major grid: "
            f"rows of {width} do not fill it"
        )
