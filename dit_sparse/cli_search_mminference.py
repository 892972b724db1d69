"""`dit-sparse search-mminference`: the offline search of MMInference."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dit_sparse.cli_options import (
    DEFAULT_PROMPT,
    Device,
    Dtype,
    Frames,
    GuidanceScale,
    Model,
    Pixels,
    Seed,
    Steps,
    Threads,
    failure,
)

if TYPE_CHECKING:
    from dit_sparse.methods.pattern_table import PatternTable

HELP = """Find, head by head, the MMInference pattern that changes the attention output least.

All patterns are brought to the measured time of one, then tried on every layer of one denoising
step of a dense generation. Writes a table, which is used as

\b
  dit-sparse compare --methods mminference:table=table.json
  SparseProcessor("mminference", table="table.json")

with the same sparsity, block, tile and strides as the search.
"""


def search_mminference(
    model: Model = "embedded",
    prompt: Annotated[
        str, typer.Option(help="Caption of the calibration sample.")
    ] = DEFAULT_PROMPT,
    method: Annotated[
        str, typer.Option(help="What to search for, as in compare: mminference:sparsity=0.9")
    ] = "mminference",
    step: Annotated[
        float, typer.Option(help="Denoising step to look at, as a share of all.")
    ] = 0.5,
    steps: Steps = None,
    seed: Seed = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    guidance_scale: GuidanceScale = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    output: Annotated[Path, typer.Option(help="The table to write.")] = Path(
        "mminference-table.json"
    ),
) -> None:
    """See `HELP`."""
    import torch

    from dit_sparse.eval import compare
    from dit_sparse.eval.arms import parse_arm
    from dit_sparse.methods.mminference import MMInference
    from dit_sparse.pipelines.search_mminference import search_patterns

    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    try:
        arm = parse_arm(method)
        if not isinstance(arm.config.method, MMInference):
            raise ValueError(f"expected --method mminference with options, got {method!r}")
        if arm.config.dense_layers or arm.config.impl != "auto":
            raise ValueError(f"expected --method without dense_layers and impl, got {method!r}")
        # The same sizes, defaults and refusals as those of a comparison.
        engine = compare.prepare(
            compare.Request(
                prompts=(prompt,),
                arms=(parse_arm("dense"), arm),
                output=output.resolve().parent,
                model=model,
                steps=steps,
                frames=frames,
                height=height,
                width=width,
                guidance_scale=guidance_scale,
                seed=seed,
                device=device,
                dtype=dtype,
            )
        )
        request, pipe = engine.request, engine.pipe
        sample = {
            argument: getattr(request, name)
            for name, argument in compare.ARGUMENTS.items()
            if getattr(request, name) is not None
        }
        noise = torch.Generator("cpu").manual_seed(seed)
        with console.status("generating the calibration sample") as status:
            table = search_patterns(
                pipe,
                arm.config.method,
                {**sample, "prompt": prompt, "generator": noise},
                step=step,
                provenance={
                    "model": request.model,
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "command": shlex.join(["dit-sparse", *sys.argv[1:]]),
                    "arguments": {**sample, "prompt": prompt, "seed": seed},
                    "machine": compare.machine_info(request.device),
                },
                on_layer=lambda done, layers: status.update(f"layer {done} of {layers}"),
            )
    # NotImplementedError: a model or a kernel that sparse attention refuses.
    except (ValueError, NotImplementedError) as error:
        raise failure(error) from error
    table.save(output)
    typer.echo(summary(table))
    typer.echo(f"written: {output}")


def summary(table: PatternTable) -> str:
    """A line for each pattern in use: how many heads chose it, and their mean error."""
    heads: dict[str, list[float]] = {}
    for choice in (choice for row in table.choices for choice in row):
        used = Counter(_name(table.patterns[index]) for index in choice.patterns)
        name = f"{choice.boundary}: {', '.join(used)}"
        heads.setdefault(name, []).append(choice.error)
    rows = sorted(heads.items(), key=lambda item: -len(item[1]))
    lines = [f"{len(e):5d} heads  error {sum(e) / len(e):.4f}  {name}" for name, e in rows]
    count = table.layers * table.heads
    mean = sum(sum(e) for e in heads.values()) / count
    return "\n".join([*lines, f"{count:5d} heads  error {mean:.4f}  in all"])


def _name(pattern: Any) -> str:
    parts = (pattern.kind, pattern.stride, pattern.lines)
    return " ".join(part for part in parts if part) + f" ({pattern.density:.3f})"


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command(name="search-mminference", help=HELP)(search_mminference)
