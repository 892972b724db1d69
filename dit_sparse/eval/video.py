"""Videos to look at: one clip, or dense, sparse and their difference side by side.

Nothing is measured on these files; see `dit_sparse.eval.metrics`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIFFERENCE_GAIN = 10.0
# Small clips are enlarged by whole factors until a panel is at least this wide.
PANEL_WIDTH = 256
BAND_HEIGHT = 28
COLORMAP = "inferno"


def to_uint8(frames: NDArray) -> NDArray[np.uint8]:
    """Rounds frames in 0..1 to 8 bits."""
    return (np.clip(np.asarray(frames, dtype=np.float32), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def write_mp4(path: Path, frames: NDArray, fps: int) -> None:
    """Writes H.264 that every browser plays, at a visually lossless quality.

    Args:
        path: File to write.
        frames: [F, H, W, 3], floats in 0..1 or uint8. Odd sizes are extended by one pixel.
        fps: Frames per second.
    """
    import imageio.v2 as imageio

    if frames.dtype != np.uint8:
        frames = to_uint8(frames)
    height, width = frames.shape[1:3]
    # The 4:2:0 format that browsers require halves the chroma size.
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = imageio.get_writer(
        path,
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        quality=None,
        pixelformat="yuv420p",
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", "12", "-preset", "medium", "-movflags", "+faststart"],
    )
    with writer:
        for frame in frames:
            writer.append_data(frame)


def difference_map(
    clip: NDArray, reference: NDArray, gain: float = DIFFERENCE_GAIN
) -> NDArray[np.float32]:
    """Heat map [F, H, W, 3] of the largest channel difference times ``gain``, clipped at 1.

    Args:
        clip: [F, H, W, 3] in 0..1.
        reference: Same shape.
        gain: Factor on the difference.
    """
    from matplotlib import colormaps

    error = np.abs(np.asarray(clip, np.float32) - np.asarray(reference, np.float32)).max(-1)
    return colormaps[COLORMAP](np.clip(error * gain, 0.0, 1.0))[..., :3].astype(np.float32)


def side_by_side(
    reference: NDArray, clip: NDArray, label: str, gain: float = DIFFERENCE_GAIN
) -> NDArray[np.uint8]:
    """Frames uint8 that show the reference, the clip and the amplified difference, labelled.

    Args:
        reference: [F, H, W, 3] in 0..1.
        clip: Same shape.
        label: Name of the method.
        gain: Factor on the difference, stated in the picture.
    """
    factor = max(1, -(-PANEL_WIDTH // clip.shape[2]))
    panels = [
        _with_band(np.repeat(np.repeat(to_uint8(panel), factor, axis=1), factor, axis=2), title)
        for panel, title in (
            (reference, "dense"),
            (clip, label),
            (difference_map(clip, reference, gain), f"|difference| x {gain:g}"),
        )
    ]
    gap = np.zeros((*panels[0].shape[:2], 4, 3), np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=2)


def _with_band(frames: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    from PIL import Image, ImageDraw, ImageFont

    width = frames.shape[2]
    band = Image.new("RGB", (width, BAND_HEIGHT), (16, 18, 24))
    draw = ImageDraw.Draw(band)
    size = 15
    font = ImageFont.load_default(size)
    while size > 8 and draw.textlength(title, font=font) > width - 12:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text((6, BAND_HEIGHT / 2), title, font=font, fill=(235, 238, 245), anchor="lm")
    stacked = np.broadcast_to(np.asarray(band), (len(frames), BAND_HEIGHT, width, 3))
    return np.concatenate([stacked, frames], axis=1)
