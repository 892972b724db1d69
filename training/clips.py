"""Captioned clips, made on the training device as fast as the model can take them.

Emoji sprites move over textures under a moving camera. Scenes are drawn in Python, a few numbers a
clip; everything per pixel is batched on the device.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from dit_sparse.pipelines.captions import (
    BACKGROUNDS,
    MAX_OBJECTS,
    OBJECTS,
    Scene,
    sample_training_scene,
)

# Noto Color Emoji holds bitmaps of this one size.
FONT_PIXELS = 109
SPRITE_PIXELS = 96
TEXTURE_PIXELS = 256

WALLS = {
    "a blue wall": (70, 130, 200),
    "a green wall": (70, 150, 90),
    "a gray wall": (150, 150, 150),
    "a purple wall": (130, 80, 160),
}
PHOTOS = {
    "bricks": "brick.png",
    "grass": "grass.png",
    "a galaxy": "hubble_deep_field.jpg",
    "a coffee table": "coffee.png",
}
TINTS = {"bricks": (1.0, 0.62, 0.5), "grass": (0.62, 1.0, 0.5)}


@dataclass(frozen=True)
class SpriteAtlas:
    """Everything that clips are made of.

    Attributes:
        sprites: ``[objects, 96, 96, 4]`` uint8 RGBA in the order of ``OBJECTS``.
        textures: ``[backgrounds, 256, 256, 3]`` uint8 in the order of ``BACKGROUNDS``.
    """

    sprites: np.ndarray
    textures: np.ndarray

    @classmethod
    def from_font(cls, path: str | Path) -> SpriteAtlas:
        """Draws the sprites from Noto Color Emoji (Debian's ``fonts-noto-color-emoji``, OFL).

        The photographs among the backgrounds come with scikit-image.
        """
        font = ImageFont.truetype(str(path), FONT_PIXELS)
        sprites = np.stack([_draw_sprite(font, emoji) for emoji in OBJECTS.values()])
        return cls(sprites, np.stack([_draw_texture(name) for name in BACKGROUNDS]))

    def save(self, path: str | Path) -> None:
        np.savez_compressed(path, sprites=self.sprites, textures=self.textures)

    @classmethod
    def load(cls, path: str | Path) -> SpriteAtlas:
        """Reads an atlas that :meth:`save` wrote.

        Raises:
            ValueError: If it was made for other objects or backgrounds.
        """
        with np.load(path) as stored:
            atlas = cls(stored["sprites"], stored["textures"])
        have = (len(atlas.sprites), len(atlas.textures))
        if have != (len(OBJECTS), len(BACKGROUNDS)):
            raise ValueError(
                f"{path} holds {have} (sprites, textures), the captions name "
                f"{(len(OBJECTS), len(BACKGROUNDS))}; make it again with python -m training.clips"
            )
        return atlas


def _draw_sprite(font: ImageFont.FreeTypeFont, emoji: str) -> np.ndarray:
    canvas = Image.new("RGBA", (2 * FONT_PIXELS, 2 * FONT_PIXELS))
    ImageDraw.Draw(canvas).text((20, 20), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font draws nothing for {emoji!r}; use NotoColorEmoji.ttf")
    glyph = canvas.crop(box)
    side = max(glyph.size) + 4
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return np.asarray(square.resize((SPRITE_PIXELS, SPRITE_PIXELS), Image.Resampling.LANCZOS))


def _draw_texture(name: str) -> np.ndarray:
    n = TEXTURE_PIXELS
    y, x = np.mgrid[0:n, 0:n]
    if name in WALLS:
        return np.broadcast_to(np.uint8(WALLS[name]), (n, n, 3)).copy()
    if name == "a checkerboard":
        light = ((x // 32 + y // 32) % 2)[..., None]
        return np.uint8(np.where(light, (225, 220, 205), (95, 100, 115)))
    if name == "stripes":
        light = (((x + y) // 24) % 2)[..., None]
        return np.uint8(np.where(light, (245, 215, 130), (60, 125, 140)))
    if name == "polka dots":
        dot = ((x % 43 - 21) ** 2 + (y % 43 - 21) ** 2 < 120)[..., None]
        return np.uint8(np.where(dot, (250, 245, 240), (205, 105, 125)))
    if name == "a sunset sky":
        down = (y / n)[..., None]
        sky = (1 - down) * np.array((60, 70, 150)) + down * np.array((250, 150, 80))
        sun = ((x - 170) ** 2 + (y - 175) ** 2 < 30**2)[..., None]
        return np.uint8(np.where(sun, (255, 230, 150), sky))
    import skimage.data  # Only where an atlas is made, not where a model is trained.

    photo = Image.open(Path(skimage.data.__file__).parent / PHOTOS[name]).convert("RGB")
    side = min(photo.size)
    photo = photo.crop((0, 0, side, side)).resize((n, n), Image.Resampling.LANCZOS)
    # The camera shows up to two texels a pixel: what is finer would flicker when it moves.
    photo = photo.filter(ImageFilter.GaussianBlur(1.5))
    return np.uint8(np.asarray(photo) * np.array(TINTS.get(name, (1.0, 1.0, 1.0))))


class ClipGenerator:
    """Renders scenes to video.

    Args:
        atlas: Sprites and textures.
        device: Where clips are made.
    """

    def __init__(self, atlas: SpriteAtlas, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        rgba = torch.from_numpy(atlas.sprites).to(self.device).float().permute(0, 3, 1, 2) / 255
        # Premultiplied, so that interpolation at the outline does not bleed the empty colour.
        sprites = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        # Level 0 for frames of 256 pixels, level 1 for 128: sprites are never shrunk by over 1.5.
        small = F.interpolate(sprites, size=64, mode="bilinear", antialias=True)
        self.sprites = (sprites, small)
        textures = torch.from_numpy(atlas.textures).to(self.device)
        self.textures = textures.float().permute(0, 3, 1, 2) / 255
        self._objects = {name: i for i, name in enumerate(OBJECTS)}
        self._backgrounds = {name: i for i, name in enumerate(BACKGROUNDS)}

    def sample(
        self,
        batch: int,
        frames: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, list[str]]:
        """Random training clips (held-out scenes never occur).

        Args:
            batch: Number of clips.
            frames: Frames a clip.
            height: Pixels.
            width: Pixels.
            generator: Source of the seed, a CPU or device generator.
            seed: The seed itself; one of the two, or neither for a fresh one.

        Returns:
            Videos ``[batch, 3, frames, height, width]`` in [-1, 1], and their captions.
        """
        if seed is None:
            source = generator.device if generator is not None else "cpu"
            drawn = torch.randint(2**62, (1,), generator=generator, device=source)
            seed = int(drawn)
        rng = random.Random(seed)
        scenes = [sample_training_scene(rng) for _ in range(batch)]
        video = self.render(scenes, frames, height, width, rng.getrandbits(60))
        return video, [scene.caption() for scene in scenes]

    def render(
        self, scenes: Sequence[Scene], frames: int, height: int, width: int, seed: int
    ) -> Tensor:
        """The clips of ``scenes``, ``[scenes, 3, frames, height, width]`` in [-1, 1]."""
        rng = random.Random(seed)
        short = min(height, width)
        reach = (width / short, height / short)
        # [scenes, frames, 4] zoom, x, y of the camera; [objects, scenes, frames, 5] x, y, radius,
        # angle, presence. A few floats a frame: made on the CPU and sent in one copy.
        camera = torch.tensor([_camera_path(s, frames, rng) for s in scenes])
        paths = torch.tensor([_object_paths(s, frames, reach, rng) for s in scenes])
        sprite = torch.tensor([_padded([self._objects[n] for n, _ in s.objects]) for s in scenes])
        backdrop = torch.tensor([self._backgrounds[s.background] for s in scenes])
        camera, paths, sprite, backdrop = (
            t.to(self.device, non_blocking=True) for t in (camera, paths, sprite, backdrop)
        )
        ys = torch.linspace(-reach[1], reach[1], height, device=self.device)
        xs = torch.linspace(-reach[0], reach[0], width, device=self.device)
        grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)  # [height, width, 2]

        count = len(scenes) * frames
        zoom, shift = (
            camera[..., 0].reshape(count, 1, 1, 1),
            camera[..., 1:].reshape(count, 1, 1, 2),
        )
        where = grid * zoom + shift
        texture = self.textures[backdrop].repeat_interleave(frames, 0)
        image = _sample(texture, where, "reflection")
        level = self.sprites[0] if short > 160 else self.sprites[1]
        for slot in range(MAX_OBJECTS):
            x, y, radius, angle, present = paths[:, slot].reshape(count, 5).unbind(-1)
            local = (grid - torch.stack([x, y], -1)[:, None, None]) / radius[:, None, None, None]
            cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
            u = cos * local[..., 0] + sin * local[..., 1]
            v = cos * local[..., 1] - sin * local[..., 0]
            layer = _sample(
                level[sprite[:, slot]].repeat_interleave(frames, 0),
                torch.stack([u, v], -1),
                "zeros",
            )
            layer = layer * present[:, None, None, None]
            image = image * (1 - layer[:, 3:]) + layer[:, :3]
        video = image.view(len(scenes), frames, 3, height, width).transpose(1, 2)
        return video.clamp(0, 1) * 2 - 1


def _sample(images: Tensor, where: Tensor, padding: str) -> Tensor:
    return F.grid_sample(images, where, padding_mode=padding, align_corners=False)


def _padded(numbers: list[int]) -> list[int]:
    return numbers + [0] * (MAX_OBJECTS - len(numbers))


def _camera_path(scene: Scene, frames: int, rng: random.Random) -> list[list[float]]:
    """Zoom, x and y of the texture for every frame."""
    x, y = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    travel = rng.uniform(0.45, 0.6)
    path = []
    for frame in range(frames):
        u = frame / max(frames - 1, 1)
        zoom, dx = 0.6, 0.0
        if scene.camera.startswith("panning"):
            # A camera that pans right sees the background move left.
            dx = (u - 0.5) * travel * (1 if scene.camera.endswith("right") else -1)
        elif scene.camera.startswith("zooming"):
            zoom *= 1.45 ** ((0.5 - u) * (2 if scene.camera.endswith("in") else -2))
        path.append([zoom, x + dx, y])
    return path


def _object_paths(
    scene: Scene, frames: int, reach: tuple[float, float], rng: random.Random
) -> list[list[list[float]]]:
    """x, y, radius, angle and presence of every object slot for every frame."""
    count = len(scene.objects)
    lanes = [(i + 0.5) / count * 2 - 1 for i in range(count)]
    rng.shuffle(lanes)
    radius = rng.uniform(0.42, 0.52) if count == 1 else rng.uniform(0.31, 0.38)
    slots = []
    for (_, motion), lane in zip(scene.objects, lanes, strict=True):
        slots.append(_motion_path(motion, lane, radius, count, frames, reach, rng))
    absent = [[0.0, 0.0, 1.0, 0.0, 0.0]] * frames
    return slots + [absent] * (MAX_OBJECTS - count)


def _motion_path(
    motion: str,
    lane: float,
    radius: float,
    count: int,
    frames: int,
    reach: tuple[float, float],
    rng: random.Random,
) -> list[list[float]]:
    free_x, free_y = reach[0] - radius, reach[1] - radius
    x0 = lane * (reach[0] - 0.5 * radius) if count > 1 else rng.uniform(-0.3, 0.3) * free_x
    x0 = max(-free_x, min(free_x, x0))
    y0 = rng.uniform(-0.35, 0.35) * free_y
    turn, phase = rng.choice((-1, 1)), rng.uniform(0, 2 * math.pi)
    # Motion repeats every 16 frames in longer clips where it is periodic.
    cycles = max(1.0, frames / 16)
    path = []
    for frame in range(frames):
        u = frame / max(frames - 1, 1)
        x, y, size, angle = x0, y0, radius, 0.0
        if motion == "moving left":
            x = free_x * (1 - 2 * u)
        elif motion == "moving right":
            x = free_x * (2 * u - 1)
        elif motion == "moving up":
            y = free_y * (1 - 2 * u)
        elif motion == "moving down":
            y = free_y * (2 * u - 1)
        elif motion == "bouncing":
            y = free_y * (1 - 1.8 * abs(math.sin(2 * math.pi * cycles * u + phase)))
        elif motion == "spinning":
            angle = turn * 2 * math.pi * cycles * u
        elif motion == "growing":
            size = radius * (0.5 + 0.8 * u)
        elif motion == "shrinking":
            size = radius * (1.3 - 0.8 * u)
        elif motion == "swinging":
            swing = math.sin(2 * math.pi * cycles * u + phase)
            x, angle = x0 + 0.35 * swing, -0.6 * swing
        path.append([x, y, size, angle, 1.0])
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the sprite atlas and a preview of clips.")
    parser.add_argument("--font", required=True, help="path of NotoColorEmoji.ttf")
    parser.add_argument("--output", required=True, help="atlas to write (.npz)")
    parser.add_argument("--preview", help="contact sheet of twelve clips to write (.png)")
    options = parser.parse_args()
    atlas = SpriteAtlas.from_font(options.font)
    atlas.save(options.output)
    if options.preview:
        video, captions = ClipGenerator(atlas).sample(12, 16, 128, 128, seed=0)
        sheet = Image.new("RGB", (6 * 132, 12 * 148), "white")
        draw = ImageDraw.Draw(sheet)
        for row, (clip, caption) in enumerate(zip(video, captions, strict=True)):
            draw.text((2, row * 148), caption, fill="black")
            for column, frame in enumerate(range(0, 16, 3)):
                pixels = ((clip[:, frame] + 1) * 127.5).byte().permute(1, 2, 0).numpy()
                sheet.paste(Image.fromarray(pixels), (column * 132, row * 148 + 14))
        sheet.save(options.preview)


if __name__ == "__main__":
    main()
