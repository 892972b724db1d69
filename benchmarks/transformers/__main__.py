"""Whole transformers, real configurations and random weights: dense diffusers against sparse.

``python -m benchmarks.transformers --output benchmarks/results/transformers-h100.json
[--models wan-1.3b,hunyuanvideo] [--compiled] [--profile] [--budget-s 540]``

Baselines are diffusers as it comes and diffusers with each faster dense backend that is installed.
Every model is first compared with dense attention at the exact setting of every method; if anything
is off no speed of it is measured and the exit code is 1.

Each transformer is built with its real width and ``--layers`` of its layers (stacks keep their
ratio). A pass without any block is timed too, and ``forward = rest + (measured - rest) x ratio``
with the ratio of real to built depth. Every kind of step of a method (dense, search, refresh,
sparse) is timed in its place in a generation of ``--steps``, and the generation is the sum of count
times forward, twice with guidance by a second pass. Text encoder, scheduler and decoder are not in
it. Both sums are written out in the JSON.

Weights and latents are random, so attention has no structure. The density of the methods measured
here follows from their settings, so times are those of a trained model; where density depends on
what attention looks like (AdaSpa gives heads with concentrated attention less), the mean stays and
the achieved one is reported. Quality cannot be seen here at all.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from benchmarks.transformers.measure import Bench
from benchmarks.transformers.models import MODELS, Model
from benchmarks.transformers.run import ModelRun, Options
from benchmarks.transformers.tables import model_table
from dit_sparse.eval.arms import Arm, parse_arm, split_entries

# For estimates: what a dense eager pass reaches on an H100 (Wan2.1-1.3B: 289 TFLOP in 667 ms),
# making a model and compiling the Triton kernels for it, and one round of torch.compile.
TFLOPS, START_S, COMPILE_S = 430, 35, 45


def estimate_s(model: Model, options: Options, methods: int) -> float:
    """About how long a model takes on an H100, from counts of passes that cost about a dense one.

    Compared: four dense passes, four a method, two that show a difference. Timed: without blocks,
    two backends with and without attention timed, padding cut off; a generation of a method costs
    about five in each branch.
    """
    rounds = 1 + options.repeats
    passes = 6 + 4 * methods + rounds * (4 + 2 * model.padded)
    generations = rounds * methods * 5 * len(model.branches)
    modes, compiles = 1, 0
    if options.compiled:
        modes, compiles = 2, 2 + model.padded + methods
    seconds = model.forward_flops(options.layers) / (TFLOPS * 1e12)
    return START_S + COMPILE_S * compiles + seconds * modes * (passes + generations)


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions."""
    if device.type == "cuda":
        from benchmarks.kernels import machine as gpu_machine

        found = gpu_machine()
    else:
        found = {"name": platform.processor() or platform.machine(), "torch": torch.__version__}
    return {**found, "diffusers": diffusers.__version__, "python": platform.python_version()}


def measure(
    model: Model, arms: Sequence[Arm], options: Options, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """All about one model; only ``checks`` where one of them failed."""
    bench = Bench(model, options.layers, device, dtype, options.steps, options.repeats)
    run = ModelRun(
        bench, arms, options, lambda line: print(f"     {model.name:14s} {line}", flush=True)
    )
    described = {
        "kind": model.kind,
        "tokens": model.tokens,
        "batch": model.batch,
        "branches": list(model.branches),
        "layers": model.depths(options.layers),
        "real_layers": model.depths(None),
        "dtype": str(dtype).removeprefix("torch."),
    }
    checks = run.checks()
    for row in checks:
        print(
            f"{'ok  ' if row['ok'] else 'FAIL'} {model.name:14s} {row['what']:44s} "
            f"{row['error']:.2e}, budget {row['budget']:.2e}",
            flush=True,
        )
    found = {"model": described, "checks": checks}
    return found | run.results() if all(row["ok"] for row in checks) else found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, help="JSON file; models already in it are kept")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument(
        "--methods",
        default="adaspa,compensated_delta",
        help="as `dit-sparse compare` takes them, e.g. adaspa:sparsity=0.9 (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", default="4", help="layers of the longest stack that are built, or all"
    )
    parser.add_argument("--steps", type=int, default=50, help="of a generation")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes and generations")
    parser.add_argument("--compiled", action="store_true", help="also with compiled blocks")
    parser.add_argument("--profile", action="store_true", help="also where a sparse step's time is")
    parser.add_argument("--budget-s", type=float, help="start no model that would exceed it")
    parser.add_argument("--again", action="store_true", help="measure what is in the file anew")
    parser.add_argument("--estimate", action="store_true", help="only say how long it would take")
    parser.add_argument("--tiny", action="store_true", help="tiny variants, to try the benchmark")
    parsed = parser.parse_args(arguments)
    parsed.models = parsed.models.split(",")
    unknown = sorted(set(parsed.models) - set(MODELS))
    if unknown:
        parser.error(f"--models takes {', '.join(MODELS)}, got {', '.join(unknown)}")
    try:
        parsed.arms = [parse_arm(entry) for entry in split_entries(parsed.methods)]
        parsed.layers = None if parsed.layers == "all" else int(parsed.layers)
        for name in parsed.models:
            (MODELS[name].shrunk() if parsed.tiny else MODELS[name]).depths(parsed.layers)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(parsed.layers, parsed.steps, parsed.repeats, parsed.compiled, parsed.profile)
    models = [MODELS[name] for name in parsed.models]
    expected = {model.name: estimate_s(model, options, len(parsed.arms)) for model in models}
    if parsed.estimate:
        for name, seconds in expected.items():
            print(f"{name:14s} {seconds:5.0f} s")
        print(f"{'in all':14s} {sum(expected.values()):5.0f} s on an H100")
        return 0
    if device.type != "cuda" and not parsed.tiny:
        sys.exit("needs a CUDA device; --tiny tries the benchmark without one")
    diffusers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    settings = {
        "layers": parsed.layers,
        "steps": parsed.steps,
        "repeats": parsed.repeats,
        "methods": [arm.label for arm in parsed.arms],
        "compiled": parsed.compiled,
        "profile": parsed.profile,
        "tiny": parsed.tiny,
    }
    here = machine(device)
    results: dict[str, Any] = {"machine": here, "models": {}}
    if parsed.output and parsed.output.exists():
        results = json.loads(parsed.output.read_text())
        if results["machine"]["name"] != here["name"]:
            sys.exit(f"{parsed.output} is of another machine, {results['machine']['name']}")
    failed = False
    for model in models:
        known = results["models"].get(model.name, {})
        is_done = "eager" in known and "errors" not in known and known["settings"] == settings
        if is_done and not parsed.again:
            print(f"{model.name} is in {parsed.output} already")
            continue
        spent = time.perf_counter() - began
        if parsed.budget_s is not None and spent + expected[model.name] > parsed.budget_s:
            print(
                f"{model.name} left out: {spent:.0f} s are spent, it takes about "
                f"{expected[model.name]:.0f}, the budget is {parsed.budget_s:.0f}"
            )
            continue
        try:
            found = measure(
                model.shrunk() if parsed.tiny else model,
                parsed.arms,
                options,
                device,
                torch.bfloat16 if device.type == "cuda" else torch.float32,
            )
        except RuntimeError:  # out of memory, too; the other models are still worth their time
            traceback.print_exc()
            failed = True
            found = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if found is None:
            continue
        if "eager" in found:
            print(model_table(model.name, found), flush=True)
            failed |= "errors" in found
        else:
            print(f"{model.name}: results are wrong; no speed is measured", flush=True)
            failed = True
        took = time.perf_counter() - began - spent
        results["models"][model.name] = {"settings": settings, "took_s": took, **found}
        if parsed.output:
            parsed.output.parent.mkdir(parents=True, exist_ok=True)
            parsed.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"took {time.perf_counter() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
