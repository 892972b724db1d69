"""What several commands of `dit-sparse` have in common: options, and how they print and fail."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

# A caption that the embedded model knows.
DEFAULT_PROMPT = "a star moving up over a sunset sky, panning right"

Model = Annotated[
    str, typer.Option(help="'embedded', a folder or a hub id of a diffusers video pipeline.")
]
Steps = Annotated[
    int | None, typer.Option(help="Denoising steps. Embedded model: 12 on CPU, 30 on CUDA.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the initial noise.")]
# Of the height, and of the width.
Pixels = Annotated[
    int | None, typer.Option(help="Pixels. Embedded model: 128 on CPU, 256 on CUDA.")
]
Frames = Annotated[int | None, typer.Option(help="Frames. Embedded model: 16 on CPU, 32 on CUDA.")]
GuidanceScale = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance. Embedded model: 1 (off) on CPU, 3 on CUDA."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16 or float16.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: what torch picks.")]


def failure(message: object) -> typer.Exit:
    """Prints why a command cannot go on; to be raised."""
    Console(stderr=True).print(f"error: {message}", style="bold red", markup=False, highlight=False)
    return typer.Exit(2)


def terminal() -> Console:
    """The console of results."""
    # In a file or a pipe Rich assumes 80 columns, which folds the names of methods.
    return Console() if sys.stdout.isatty() else Console(width=120)
