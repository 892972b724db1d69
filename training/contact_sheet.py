"""Renders a contact sheet: one row per caption, eight frames of the generated clip.

Example:
    python -m training.contact_sheet --model runs/emoji/model --output sheet.png --count 10
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dit_sparse.pipelines.embedded import dtype_argument
from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline
from training.train import build_clips, codec_psnr, parse_size

FRAMES_PER_ROW = 8
LABEL_WIDTH = 180
GAP = 2


def contact_sheet(videos: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Draws rows of evenly spaced frames with their captions.

    Args:
        videos: [N, F, H, W, 3] in 0..1.
        captions: N texts.

    Returns:
        The sheet.
    """
    count, frames, height, width, _ = videos.shape
    if len(captions) != count:
        raise ValueError(
            f"expected one caption per video ({count}), got {len(captions)}; pass lists that match"
        )
    columns = min(FRAMES_PER_ROW, frames)
    picks = np.linspace(0, frames - 1, columns).round().astype(int)
    row = max(height, 64) + GAP
    sheet = Image.new("RGB", (LABEL_WIDTH + columns * (width + GAP), count * row), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        text = "\n".join(textwrap.wrap(caption, 27))
        draw.multiline_text((6, index * row + 6), text, fill="black")
        for column, pick in enumerate(picks):
            frame = Image.fromarray((video[pick] * 255).round().clip(0, 255).astype(np.uint8))
            sheet.paste(frame, (LABEL_WIDTH + column * (width + GAP), index * row))
    return sheet


def read_prompts(source: str, count: int) -> list[str]:
    """Captions named by `--prompts`: "held-out", a text file with one per line, or "a|b|c"."""
    if source == "held-out":
        from dit_sparse.pipelines.captions import HELD_OUT_PROMPTS

        prompts = list(HELD_OUT_PROMPTS)
    elif Path(source).is_file():
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = [part.strip() for part in source.split("|")]
    return prompts[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.contact_sheet", description="Renders a contact sheet."
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="pipeline folder")
    add("--output", type=Path, required=True, help="PNG to write")
    add("--prompts", default="held-out", help='"held-out", a text file, or captions "a|b"')
    add("--count", type=int, default=10)
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=3.0)
    add("--size", default="16x128x128", help="FRAMESxHEIGHTxWIDTH")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=4, help="captions per call")
    add("--atlas", type=Path, default=None, help="also print the codec's PSNR on this atlas")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    frames, height, width = parse_size(options.size)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = EmojiVideoPipeline.from_pretrained(str(options.model), **dtype_argument(dtype))
    pipe.to(device)
    pipe.set_progress_bar_config(mininterval=2.0)
    prompts = read_prompts(options.prompts, options.count)
    rows = []
    for first in range(0, len(prompts), options.batch):
        batch = prompts[first : first + options.batch]
        # One generator per row: a row does not depend on the batch size or on other captions.
        generators = [
            torch.Generator("cpu").manual_seed(options.seed + first + i) for i in range(len(batch))
        ]
        result = pipe(
            batch,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=generators,
        )
        rows.append(result.frames)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(np.concatenate(rows), prompts).save(options.output)
    print(f"wrote {options.output}")
    if options.atlas is not None:
        clips = build_clips(options.atlas, device)
        psnr = codec_psnr(pipe.codec, clips, (frames, height, width))
        print(f"codec PSNR over 64 clips: {psnr:.2f} dB")


if __name__ == "__main__":
    main()
