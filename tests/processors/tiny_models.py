"""Every supported transformer, tiny and with random weights, and inputs for it.

The configurations are the smallest with which each class runs. Inputs are drawn for any token grid,
so that what an adapter says about a pass can be checked against what was asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from installed import find
from torch import Tensor, nn

Grid = tuple[int, int, int]


class Draw:
    """Seeded tensors on a device; on "meta" they are shapes alone."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=self.generator)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device)

    def valid(self, *lengths: int, tokens: int) -> Tensor:
        """Padding masks ``[len(lengths), tokens]`` int64, each with its first tokens valid."""
        rows = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        return rows.long().to(self.device)

    def ids(self, grid: Grid, columns: int = 3, first: float = 0, scale: float = 1.0) -> Tensor:
        """Position ids of an image, always with values: (first + frame, row, column, 0...)."""
        axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        places = torch.stack(axes, -1).view(-1, 3).float()
        places[:, 0] += first
        places[:, 1:] *= scale
        return torch.cat([places, torch.zeros(len(places), columns - 3)], 1)


@dataclass(frozen=True, eq=False)
class Tiny:
    """One configuration of one transformer class.

    Attributes:
        model: Class name in diffusers.
        config: Its arguments.
        inputs: Forward arguments for a draw, a token grid and a batch size.
        beside: Tokens before and after the grid in the main self-attention, stated by hand: a pair,
            or a function of grid and batch size.
        latents: Argument and axes of the latents, "BCFHW" and the like, or "packed".
        patch: Latent positions of a token along (frames, height, width).
        variant: Tells configurations of one class apart.
        grid: Grid of the inputs that go through the model.
        batch: Batch size of those inputs.
        packed_at: Where the grid starts in packed latents.
        mixes: Image tokens attend to each other before the first site (refiners).
        masked: The model passes a mask of padding to its main self-attention.
        untouched: Parts of names of attention modules that exist and must stay as they are.
        sites: Number of main-stack self-attention layers.
        frames_from: Fewest frames that the inputs can have.
        largest: Tokens of the largest image that the configuration allows.
        used: First and last output token that pipelines use, where they cut the rest off.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[Draw, Grid, int], dict[str, Any]]
    beside: Any = (0, 0)
    latents: tuple[str, str] = ("hidden_states", "BCFHW")
    patch: Grid = (1, 2, 2)
    variant: str = ""
    grid: Grid = (2, 3, 4)
    batch: int = 2
    packed_at: int = 0
    mixes: bool = False
    masked: bool = False
    untouched: tuple[str, ...] = ()
    sites: int = 2
    used: tuple[int, int | None] = (0, None)
    largest: int = 2**31
    frames_from: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}-{self.variant}" if self.variant else self.model

    def build(self) -> Any:
        """The model in eval mode, every parameter random: zero-initialised gates would hide us."""
        kind = find("diffusers.models.transformers", self.model)
        missing = set(self.config) - set(inspect.signature(kind.__init__).parameters)
        if missing:
            pytest.skip(f"{self.model} of diffusers {diffusers.__version__} has no {missing}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind(**self.config).eval()
            randomize(model)
        return model.requires_grad_(False)

    def expected(self, grid: Grid, batch: int) -> tuple[int, int]:
        return self.beside(grid, batch) if callable(self.beside) else self.beside


def randomize(model: nn.Module) -> None:
    """Noise on all parameters, small enough that activations stay in range."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or not parameter.is_floating_point():
            continue
        scale = 0.3 if "norm" in name else 0.1
        # Some are left as the memory was: anything, also NaN.
        parameter.data[~(parameter.abs() < 1e4)] = 0
        parameter.data += scale * torch.randn_like(parameter)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def latents_of(tiny: Tiny, inputs: dict[str, Any]) -> Any:
    return inputs[tiny.latents[0]]


def poke(tiny: Tiny, inputs: dict[str, Any], grid: Grid, place: Grid) -> None:
    """Changes the latent of the token at ``place`` of the first batch element, in place."""
    latents, axes = latents_of(tiny, inputs), tiny.latents[1]
    if axes == "packed":
        index = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
        latents[0, tiny.packed_at + index] += 3.0
        return
    if axes == "list":
        latents, axes = latents[0], "CFHW"
    span = {
        axis: slice(at * step, (at + 1) * step)
        for axis, at, step in zip("FHW", place, tiny.patch, strict=True)
    }
    # Of several items (axis N) the last one is the image.
    fixed = {"B": 0, "N": -1}
    index = [fixed.get(axis, span.get(axis, slice(None))) for axis in axes]
    latents[tuple(index)] += 3.0


def tiny_models() -> list[Tiny]:
    from tiny_images import IMAGES
    from tiny_videos import VIDEOS

    return [*VIDEOS, *IMAGES]
