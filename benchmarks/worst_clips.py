"""The clip that each method changed most: kept beside a result, and shown on one sheet.

``python -m benchmarks.worst_clips benchmarks/results/evidence-*.worst.npz --output
docs/worst-clips.webp``
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_sparse.eval.video import side_by_side

# Quality of the image format, from the best that is tried to the worst.
QUALITIES = (90, 80, 70, 60, 50, 40, 30)
MOST_BYTES = 300_000


@dataclass(frozen=True)
class WorstClip:
    """The middle frame of the clip of lowest PSNR under an arm.

    Attributes:
        arm: Its label.
        caption: What was to be shown.
        psnr: Of the clip, dB.
        dense: uint8 ``[height, width, 3]``.
        sparse: Same shape.
    """

    arm: str
    caption: str
    psnr: float
    dense: NDArray[np.uint8]
    sparse: NDArray[np.uint8]


def frames_path(result: Path) -> Path:
    """Where the worst clips of a result file are."""
    return result.with_suffix(".worst.npz")


def load(path: Path) -> list[WorstClip]:
    """The clips that :func:`keep` wrote; none if there is no such file."""
    if not path.is_file():
        return []
    with np.load(path) as data:
        titles = json.loads(str(data["titles"]))
        return [WorstClip(*title, *data[f"clip{i}"]) for i, title in enumerate(titles)]


def keep(path: Path, clip: WorstClip) -> None:
    """Adds a clip to a file, in place of an earlier one of the same arm."""
    clips = [other for other in load(path) if other.arm != clip.arm] + [clip]
    titles = json.dumps([[c.arm, c.caption, c.psnr] for c in clips])
    arrays: dict[str, Any] = {"titles": np.array(titles)}
    arrays |= {f"clip{i}": np.stack([c.dense, c.sparse]) for i, c in enumerate(clips)}
    np.savez_compressed(path, **arrays)


def sheet(clips: list[WorstClip], columns: int = 2) -> NDArray[np.uint8]:
    """One picture: dense, sparse and their amplified difference of every clip.

    Args:
        clips: All of one size.
        columns: Clips side by side.
    """
    panels = [
        side_by_side(
            clip.dense[None] / np.float32(255),
            clip.sparse[None] / np.float32(255),
            f"{clip.arm}, {clip.psnr:.1f} dB",
        )[0]
        for clip in clips
    ]
    blank = np.zeros_like(panels[0])
    panels += [blank] * (-len(panels) % columns)
    rows = [
        np.concatenate([np.pad(p, ((0, 6), (0, 6), (0, 0))) for p in panels[i : i + columns]], 1)
        for i in range(0, len(panels), columns)
    ]
    return np.concatenate(rows)


def write_sheet(clips: list[WorstClip], path: Path, most_bytes: int = MOST_BYTES) -> int:
    """Writes the sheet as WebP, at the best quality that fits.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: If there are no clips, or no quality makes it small enough.
    """
    from PIL import Image

    if not clips:
        raise ValueError("expected at least one clip; mark arms with 'show' in their file")
    picture = Image.fromarray(sheet(clips))
    for quality in QUALITIES:
        picture.save(path, quality=quality, method=6)
        size = path.stat().st_size
        if size <= most_bytes:
            return size
    path.unlink()
    raise ValueError(f"{len(clips)} clips take {size} bytes, more than {most_bytes}; show fewer")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("frames", nargs="+", type=Path, help="*.worst.npz of evidence runs")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    clips = [clip for path in options.frames for clip in load(path)]
    print(f"{options.output}: {write_sheet(clips, options.output)} bytes")


if __name__ == "__main__":
    main()
