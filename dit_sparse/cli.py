"""The command line `dit-sparse` and its commands.

torch and diffusers take seconds to import, so every command imports them itself and `--help` does
not.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dit_sparse import cli_gna_plan, cli_search, cli_search_mminference
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
    terminal,
)

if TYPE_CHECKING:
    from dit_sparse.eval.compare import Comparison, Request

DEFAULT_METHODS = "dense,noise-floor,adaspa:sparsity=0.6,adaspa:sparsity=0.8,compensated_delta"

COMPARE_HELP = """Generate the same clip dense and sparse; report quality, density and time.

Every arm starts from the same noise. Writes report.json, report.html (one self-contained page)
and the videos to --output. With several GPUs,
`accelerate launch --num_processes 4 -m dit_sparse compare ...` shares the prompts among them.

\b
METHODS are comma-separated entries:
  dense                 the reference; always runs, listed or not
  noise-floor           all blocks, by our kernels: what rounding alone changes
  adaspa                a method at its defaults, see `dit-sparse methods`
  adaspa:sparsity=0.8:block=128
                        a method with options; tuples as search=(0.2,0.6)
  path/to/config.json   a saved SparseConfig
With --at-density their density settings are only a start, and the entry is shown as
  adaspa@0.298          with the density that its sparse steps achieve

\b
report.json:
  schema_version, created, command, model
  machine{cpu, threads, gpu, driver, cuda, torch, diffusers, triton,
          dit_sparse, python, processes}
  settings{steps, seed, height, width, frames, guidance_scale, dtype, device,
           fps, difference_gain}
  runs[]  one per prompt and arm, dense first:
    prompt, method, config
    psnr_mean, psnr_min, psnr_clip
                        dB against dense; "inf" if identical, null for dense
    identical_frames    frames equal to dense; psnr_mean leaves them out
    ssim                mean over frames
    density             share of blocks computed; dense calls count as 1
    sparse_density      the same over sparse calls; null if there were none
    dense_steps, sparse_steps
                        denoising steps with full and with sparse attention
    attention_s         seconds in self-attention, search included
    search_s            seconds in mask search
    total_s, speedup    seconds of the generation; that of dense / this one
    cache_mb            memory held between steps, 10^6 bytes
    kernels             attention calls by kernel
    video, side_by_side paths relative to report.json
    psnr_frames, ssim_frames
"""

app = typer.Typer(
    name="dit-sparse",
    help="Sparse attention for diffusers video models, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Sparse attention for diffusers video models, without retraining."""


@app.command(help=COMPARE_HELP)
def compare(
    model: Model = "embedded",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Caption; repeatable. Default: a fixed one.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with a caption a line.")] = None,
    methods: Annotated[str, typer.Option(help="Arms, see above.")] = DEFAULT_METHODS,
    steps: Steps = None,
    seed: Seed = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    guidance_scale: GuidanceScale = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path, typer.Option(help="Folder for report and videos.")] = Path(
        "dit-sparse-compare"
    ),
    fps: Annotated[
        int | None, typer.Option(help="Of the videos. Embedded model: 8, others 16.")
    ] = None,
    threads: Threads = None,
    at_density: Annotated[
        float | None,
        typer.Option(
            help="Turn every method until its sparse steps compute this share of the blocks, then "
            "compare. Takes some more generations a method."
        ),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print report.json, and nothing else, to stdout.")
    ] = False,
) -> None:
    """See `COMPARE_HELP`."""
    captions = _captions(prompt, prompts)
    import torch

    from dit_sparse.eval.arms import parse_arms
    from dit_sparse.eval.compare import Request
    from dit_sparse.eval.ranks import Ranks

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        request = Request(
            prompts=captions,
            arms=tuple(parse_arms(methods)),
            output=output,
            model=model,
            steps=steps,
            frames=frames,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            seed=seed,
            device=device,
            dtype=dtype,
            fps=fps,
            command=shlex.join([app.info.name or "dit-sparse", *sys.argv[1:]]),
        ).resolved()
    except ValueError as error:
        raise failure(error) from error
    pipe = None
    try:
        ranks = Ranks.started(request.device)
        messages = Console(stderr=True, quiet=ranks.index > 0)
        if at_density is not None:
            if ranks.index == 0:
                request, pipe = _turn_to_density(request, at_density, messages)
            request = replace(request, arms=ranks.from_first(request.arms))
        result = _run_with_progress(request, messages, pipe)
    # NotImplementedError: a model or a kernel that sparse attention refuses.
    except (ValueError, NotImplementedError) as error:
        raise failure(error) from error
    ranks.leave()
    if ranks.index > 0:
        return
    if json_:
        # Not through Rich, which would wrap long lines.
        sys.stdout.write(result.to_json() + "\n")
    show = messages if json_ else terminal()
    for section in _tables(result):
        show.print(section)
    for path in (result.html_path, result.json_path, result.request.output / "videos"):
        show.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def _captions(prompt: list[str] | None, file: Path | None) -> tuple[str, ...]:
    captions = list(prompt or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise failure(
                f"expected --prompts to be a readable UTF-8 text file, got {str(file)!r}: {error}"
            ) from error
        captions += [line.strip() for line in lines if line.strip()]
        if not captions:
            raise failure(f"expected a caption a line in {str(file)!r}, got an empty file")
    return tuple(captions or [DEFAULT_PROMPT])


def _turn_to_density(request: Request, target: float, console: Console) -> tuple[Request, Any]:
    from dit_sparse.eval.protocol import TOLERANCE, at_density

    with console.status(f"looking for density {target:g}") as status:
        request, pipe, found = at_density(
            request, target, on_stage=lambda text: status.update(f"density {target:g}: {text}")
        )
    for label, matched in found.items():
        if abs(matched.density - target) > TOLERANCE:
            console.print(
                f"{label}: {matched.density:.3f} is the nearest to density {target:g} that was "
                f"found in {len(matched.tries)} tries",
                style="yellow",
                markup=False,
                highlight=False,
            )
    return request, pipe


def _run_with_progress(request: Request, console: Console, pipe: Any = None) -> Comparison:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )

    from dit_sparse.eval.compare import run_comparison

    chosen = {
        "steps": request.steps,
        "frames": request.frames,
        "size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "guidance": request.guidance_scale,
        "seed": request.seed,
    }
    shown = ", ".join(f"{k} {v}" for k, v in chosen.items() if v is not None)
    console.print(
        f"{request.model} on {request.device} ({request.dtype}): {shown}; "
        f"{len(request.prompts)} prompt(s) x {len(request.arms)} arms",
        highlight=False,
        markup=False,
    )
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        status = progress.add_task("starting", total=None)
        tasks: dict[tuple[str, str], TaskID] = {}

        def on_stage(text: str) -> None:
            progress.update(status, description=text, visible=True)

        def on_step(prompt: str, label: str, done: int, steps: int) -> None:
            progress.update(status, visible=False)
            if (prompt, label) not in tasks:
                name = label if len(request.prompts) == 1 else f"{prompt[:32]} | {label}"
                tasks[prompt, label] = progress.add_task(name, total=steps)
            progress.update(tasks[prompt, label], completed=done)

        result = run_comparison(request, pipe=pipe, on_step=on_step, on_stage=on_stage)
        progress.update(status, visible=False)
    return result


def _tables(result: Comparison) -> list[Any]:
    from itertools import groupby

    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dit_sparse.eval.html import format_number

    columns: tuple[str, ...] = (
        "PSNR\nmean",
        "PSNR\nmin",
        "PSNR\nclip",
        "SSIM",
        "density",
        "dense\nsteps",
    )
    columns += ("atten-\ntion s", "total\ns", "speed-\nup")
    tables = []
    for prompt, runs in groupby(result.runs, key=lambda run: run.prompt):
        table = Table(
            title=Text(prompt), box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True
        )
        table.add_column("method", overflow="fold")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for run in runs:
            values = run.to_dict()
            table.add_row(
                Text(run.method),
                *(format_number(values[k]) for k in ("psnr_mean", "psnr_min", "psnr_clip")),
                format_number(values["ssim"], 4),
                format_number(run.density, 3),
                f"{run.dense_steps}/{result.request.steps}",
                format_number(run.attention_s),
                format_number(run.total_s),
                format_number(run.speedup, 2, "x"),
            )
        tables.append(table)
    if len(tables) > 1:
        tables.append(_worst_cases(result))
    return tables


def _worst_cases(result: Comparison) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dit_sparse.eval.html import format_number
    from dit_sparse.eval.protocol import summarize

    table = Table(title="All prompts", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("method", overflow="fold")
    for column in ("PSNR\nmean", "PSNR\nworst", "SSIM\nmean", "SSIM\nworst"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("worst prompt", overflow="fold")
    for row in summarize(result.runs):
        table.add_row(
            Text(row.method),
            format_number(row.psnr),
            format_number(row.psnr_worst),
            format_number(row.ssim, 4),
            format_number(row.ssim_worst, 4),
            Text(row.worst_prompt),
        )
    return table


@app.command()
def methods() -> None:
    """List the sparse methods with their options."""
    import dataclasses
    import inspect

    from rich.table import Table
    from rich.text import Text

    from dit_sparse import list_methods

    table = Table(title="Methods", title_justify="left")
    for column in ("name", "what it does", "options and defaults"):
        table.add_column(column)
    for name, kind in sorted(list_methods().items()):
        options = "\n".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(kind))
        summary = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
        table.add_row(Text(name), Text(summary), Text(options))
    terminal().print(table)


@app.command()
def families(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/families.md instead.")
    ] = False,
) -> None:
    """List the transformers that sparse attention runs on, and those it refuses with the reason."""
    from rich.table import Table
    from rich.text import Text

    from dit_sparse.processors.refused import REFUSED
    from dit_sparse.processors.table import METHOD_MARKS, family_rows, to_markdown

    if markdown:
        sys.stdout.write(to_markdown())
        return
    supported = Table(title="Transformers", title_justify="left")
    for column in ("class", "tokens of its self-attention", "set_attn_processor"):
        supported.add_column(column)
    for row in family_rows():
        supported.add_row(row.model, Text(row.tokens), METHOD_MARKS[row.has_method])
    refused = Table(title="Refused", title_justify="left")
    for column in ("class", "why"):
        refused.add_column(column)
    for model, reason in sorted(REFUSED.items()):
        refused.add_row(model, Text(reason))
    console = terminal()
    console.print(supported)
    console.print(refused)


cli_gna_plan.register(app)
cli_search.register(app)
cli_search_mminference.register(app)

if __name__ == "__main__":
    app()
