"""The command `dit-sparse search`: an offline search for Sparse-vDiT.

torch and diffusers take seconds to import, so the command imports them itself and `--help` does
not.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
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
    terminal,
)

if TYPE_CHECKING:
    from dit_sparse.pipelines.search import SearchResult, SearchSettings

# Objects, motions, backgrounds and cameras of the embedded model, none of them twice.
EMBEDDED_CAPTIONS = (
    DEFAULT_PROMPT,
    "a fox bouncing and a balloon moving left over bricks, still camera",
)
DEFAULT_TARGET = 0.4
DENSITIES = (0.5, 0.25, 0.125)

SEARCH_HELP = """Search which attention pattern each head gets, for the method sparse_vdit.

Generates the calibration captions; in every self-attention call all patterns of all heads are
measured against the dense output. Writes a plan that
SparseProcessor("sparse_vdit", plan="plan.json") follows. An interrupted search goes on where it
stopped when the same command is given again; another lambda or target cost over the same
measurements needs no new ones with --strategy stored.

\b
The choice per head and step:
  loss = error + lambda x cost, error = |O - O_dense|^2 over the mean |O_dense|^2
  of the layer's heads. The cheapest pattern wins, unless its loss exceeds
  epsilon: then the head is dense. Epsilon is by default the loss of dense
  (lambda), which minimises the total error at a given total cost.
  With --target-cost lambda is found (or epsilon, if --lambda is given).

\b
The plan (JSON):
  format, version     "dit-sparse plan", 1
  model{class, config, layers, heads, dim}
                      what the plan fits; other models are refused
  grid                video tokens (frames, height, width) it was searched at
  block               tokens in a block
  modes[]             {mode, density?, shift?}; the first is dense
  steps[]             by noise level; other step counts take the nearest
    progress          how far the noise has fallen, 0 to 1
    component         transformer that runs there
    layers[]          one character a head: index of its mode, 0-9 then a-z
  provenance          model, weights, captions, seed, sizes, scheduler, machine
                      and versions, command; search{strategy, cost, costs,
                      lambda, epsilon, target_cost, mean_cost, mean_loss, warmup}
"""


def search(
    output: Annotated[Path, typer.Option(help="The plan to write.")] = Path("plan.json"),
    model: Model = "embedded",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Calibration caption; repeatable. Embedded model: two fixed ones."),
    ] = None,
    target_cost: Annotated[
        float | None,
        typer.Option(
            help="Mean cost over all heads, layers and steps, dense = 1. "
            f"Default without --lambda: {DEFAULT_TARGET}."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--lambda", help="Price of cost in the loss, see above.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Loss above which a head stays dense; with --lambda.")
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            help="measured: latency of each pattern at this shape on this machine; nominal: the "
            "share of pairs it computes."
        ),
    ] = "measured",
    strategy: Annotated[
        str,
        typer.Option(
            help="greedy: choices feed the next layers and steps; stored: all errors are measured "
            "on the dense trajectory."
        ),
    ] = "greedy",
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="Candidate, repeatable: skip, diagonal, multi_diagonal, vertical_stripe. "
            "Default: all."
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help=f"Density of the patterns, repeatable. Default: {DENSITIES}."),
    ] = None,
    shifts: Annotated[int, typer.Option(min=1, help="Places tried for stripes.")] = 2,
    block: Annotated[
        int | None,
        typer.Option(help="Tokens in a block, 64 or 128. Default: 64 on CPU, 128 on CUDA."),
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps that stay dense at first.")
    ] = 0.0,
    steps: Steps = None,
    seed: Seed = 0,
    height: Pixels = None,
    width: Pixels = None,
    frames: Frames = None,
    guidance_scale: GuidanceScale = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    state: Annotated[
        Path | None,
        typer.Option(help="File of the measurements. Default: beside the plan, *.state."),
    ] = None,
    threads: Threads = None,
) -> None:
    """See `SEARCH_HELP`."""
    import torch

    from dit_sparse.eval.arms import parse_arms
    from dit_sparse.eval.compare import EMBEDDED, Request, load_pipeline
    from dit_sparse.methods.plan import MODE_NAMES
    from dit_sparse.pipelines.search import SearchSettings, candidate_modes

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        if not prompt and model != EMBEDDED:
            raise ValueError("expected --prompt, captions that are typical of the videos to come")
        # The same sizes, defaults and refusals as those of a comparison.
        request = Request(
            prompts=tuple(prompt or EMBEDDED_CAPTIONS),
            arms=tuple(parse_arms("noise-floor")),
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
        ).resolved()
        is_cuda = request.device.startswith("cuda")
        settings = SearchSettings(
            modes=candidate_modes(tuple(mode or MODE_NAMES), tuple(density or DENSITIES), shifts),
            block=block or (128 if is_cuda else 64),
            strategy=strategy,
            cost=cost,
            price=price,
            epsilon=epsilon,
            target_cost=DEFAULT_TARGET if price is None and target_cost is None else target_cost,
            warmup=warmup,
        )
        pipe = load_pipeline(request.model, request.device, request.dtype)
        pipe.set_progress_bar_config(disable=True)
        found = _run(pipe, request, settings, state or output.with_suffix(".state"))
    # NotImplementedError: a model or a kernel that sparse attention refuses.
    except (ValueError, NotImplementedError) as error:
        raise failure(error) from error
    found.plan.save(output)
    _print(found, output)


def _run(pipe: Any, request: Any, settings: SearchSettings, state_path: Path) -> SearchResult:
    """Generates, measures and chooses, with a progress bar."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from dit_sparse.eval.compare import ARGUMENTS, machine_info
    from dit_sparse.pipelines.search import search
    from dit_sparse.pipelines.search_state import SearchState
    from dit_sparse.processors.family import find_family

    arguments = {
        argument: getattr(request, name)
        for name, argument in ARGUMENTS.items()
        if getattr(request, name) is not None
    }
    inputs = {
        "model": request.model,
        "captions": list(request.prompts),
        "seed": request.seed,
        **{name: getattr(request, name) for name in ARGUMENTS},
        "dtype": request.dtype,
        "device": request.device,
    }
    key = {
        **inputs,
        "modes": [mode.to_dict() for mode in settings.modes],
        "block": settings.block,
        "warmup": settings.warmup,
    }
    console = Console(stderr=True)
    state = SearchState(state_path, key)
    if state.losses:
        console.print(f"going on from {state_path}", markup=False, highlight=False)

    def generate(caption: str, step: Any) -> None:
        def after_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict) -> dict:
            step()
            return tensors

        pipe(
            prompt=caption,
            **arguments,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            callback_on_step_end=after_step,
        )

    scheduler = pipe.scheduler
    provenance = {
        **inputs,
        "scheduler": {
            "class": type(scheduler).__name__,
            **{k: v for k, v in scheduler.config.items() if _is_plain(k, v)},
        },
        "weights": {
            name: _weights_digest(component)
            for name, component in pipe.components.items()
            if isinstance(component, torch.nn.Module) and find_family(component) is not None
        },
        "machine": machine_info(request.device),
        "command": shlex.join(["dit-sparse", *sys.argv[1:]]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} steps"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        tasks: dict[tuple[str, int], Any] = {}

        def on_progress(phase: str, number: int, done: int) -> None:
            if (phase, number) not in tasks:
                name = f"{phase.partition(' ')[0]} | {request.prompts[number][:40]}"
                tasks[phase, number] = progress.add_task(name, total=request.steps)
            progress.update(tasks[phase, number], completed=done)

        found = search(pipe, generate, request.prompts, settings, state, provenance, on_progress)
    return found


def _weights_digest(model: Any) -> str:
    """A digest of a few values of every parameter: tells a model that was trained on."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_plain(key: str, value: Any) -> bool:
    return not key.startswith("_") and isinstance(value, bool | int | float | str)


def _print(found: SearchResult, output: Path) -> None:
    """How many heads each mode got."""
    from collections import Counter

    from rich import box
    from rich.table import Table

    plan = found.plan
    counts = Counter(mode for step in plan.steps for row in step.table for mode in row)
    table = Table(box=box.SIMPLE_HEAD)
    for column, justify in (("pattern", "left"), ("cost", "right"), ("heads", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for index, mode in enumerate(plan.modes):
        share = 100 * counts[index] / counts.total()
        table.add_row(str(mode), f"{found.costs[index]:.3f}", f"{share:.1f} %")
    console = terminal()
    console.print(table)
    console.print(
        f"mean cost {found.mean_cost:.4f}, mean error {found.mean_loss:.5f}, lambda "
        f"{found.price:.5g}, epsilon {found.epsilon:.5g}",
        highlight=False,
    )
    console.print(f"written: {output}", markup=False, highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command(name="search", help=SEARCH_HELP)(search)
