"""The captions that the embedded model understands: what, how it moves, where, which camera."""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from difflib import get_close_matches

# One emoji each, chosen to differ in outline and colour.
OBJECTS = {
    "cat": "\U0001f431",
    "frog": "\U0001f438",
    "panda": "\U0001f43c",
    "pig": "\U0001f437",
    "fox": "\U0001f98a",
    "octopus": "\U0001f419",
    "butterfly": "\U0001f98b",
    "fish": "\U0001f420",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "strawberry": "\U0001f353",
    "watermelon": "\U0001f349",
    "pizza": "\U0001f355",
    "hamburger": "\U0001f354",
    "doughnut": "\U0001f369",
    "football": "\u26bd",
    "basketball": "\U0001f3c0",
    "balloon": "\U0001f388",
    "rocket": "\U0001f680",
    "car": "\U0001f697",
    "guitar": "\U0001f3b8",
    "sunflower": "\U0001f33b",
    "cactus": "\U0001f335",
    "ghost": "\U0001f47b",
    "star": "\u2b50",
    "heart": "\u2764",
}
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "bouncing",
    "spinning",
    "growing",
    "shrinking",
    "swinging",
    "standing still",
)
# A plain wall shows no camera motion, so only the others are filmed with a moving camera.
PLAIN_BACKGROUNDS = ("a blue wall", "a green wall", "a gray wall", "a purple wall")
TEXTURED_BACKGROUNDS = (
    "a checkerboard",
    "stripes",
    "polka dots",
    "a sunset sky",
    "bricks",
    "grass",
    "a galaxy",
    "a coffee table",
)
BACKGROUNDS = (*PLAIN_BACKGROUNDS, *TEXTURED_BACKGROUNDS)
CAMERAS = ("still camera", "panning left", "panning right", "zooming in", "zooming out")

MAX_OBJECTS = 3
# Shares of clips with one, two and three objects.
OBJECT_COUNTS = (0.55, 0.33, 0.12)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a clip shows.

    Attributes:
        objects: (object, motion) pairs; later ones stand in front.
        background: One of ``BACKGROUNDS``.
        camera: One of ``CAMERAS``.
    """

    objects: tuple[tuple[str, str], ...]
    background: str
    camera: str

    def caption(self) -> str:
        """E.g. ``"a cat bouncing and a pig spinning over stripes, panning left"``."""
        things = " and ".join(
            f"{'an' if name[0] in 'aeiou' else 'a'} {name} {motion}"
            for name, motion in self.objects
        )
        return f"{things} over {self.background}, {self.camera}"


def is_held_out(scene: Scene) -> bool:
    """Whether a combination of objects, motions and background is kept out of training."""
    key = "|".join(
        [*sorted(f"{name} {motion}" for name, motion in scene.objects), scene.background]
    )
    return zlib.crc32(key.encode()) % 10 == 0


def sample_scene(rng: random.Random) -> Scene:
    """A random scene, held out or not."""
    count = rng.choices(range(1, MAX_OBJECTS + 1), OBJECT_COUNTS)[0]
    names = rng.sample(list(OBJECTS), count)
    background = rng.choice(BACKGROUNDS)
    camera = CAMERAS[0] if background in PLAIN_BACKGROUNDS else rng.choice(CAMERAS)
    return Scene(tuple((name, rng.choice(MOTIONS)) for name in names), background, camera)


def sample_training_scene(rng: random.Random) -> Scene:
    """A random scene that is not held out."""
    while is_held_out(scene := sample_scene(rng)):
        pass
    return scene


def held_out_scenes(count: int, seed: int = 0) -> tuple[Scene, ...]:
    """The first ``count`` held-out scenes of a seeded stream; at most two objects each."""
    rng = random.Random(seed)
    found: list[Scene] = []
    while len(found) < count:
        scene = sample_scene(rng)
        if is_held_out(scene) and len(scene.objects) < 3 and scene not in found:
            found.append(scene)
    return tuple(found)


HELD_OUT_PROMPTS = tuple(scene.caption() for scene in held_out_scenes(20))

WORDS = tuple(
    sorted(
        {
            word
            for part in (*OBJECTS, *MOTIONS, *BACKGROUNDS, *CAMERAS, "a", "an", "and", "over")
            for word in part.split()
        }
    )
)
# Three objects of five words at most, two "and", "over", three words of background, two of camera.
MAX_WORDS = 24


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, of any script: a word that is dropped could not be told of."""
    return re.findall(r"[^\W_]+", text.lower())


def tokenize(text: str) -> list[int]:
    """Word numbers of a caption: 0 is padding, ``2 + i`` is ``WORDS[i]``.

    Raises:
        ValueError: On a word that no training caption holds; names the closest ones.
    """
    ids = []
    for word in words_of(text):
        if word not in WORDS:
            close = get_close_matches(word, WORDS, n=3) or list(OBJECTS)[:3]
            raise ValueError(
                f"the embedded model does not know the word {word!r}; close to it: "
                f"{', '.join(close)}. Captions read like {HELD_OUT_PROMPTS[0]!r}"
            )
        ids.append(2 + WORDS.index(word))
    if len(ids) > MAX_WORDS:
        raise ValueError(f"a caption has at most {MAX_WORDS} words, got {len(ids)}")
    return ids
