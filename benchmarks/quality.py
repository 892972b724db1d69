"""Quality against time on the embedded model: many captions, many arms, paired statistics.

    python -m benchmarks.quality --size 16x256x256 --budget-s 540 \\
        --arms benchmarks/arms/main.txt,benchmarks/arms/own.txt --output evidence-8192.json

generates the held-out captions under every arm (see :mod:`benchmarks.quality_arms`) from the same
noise and compares them with the dense clips. The result is written after each arm; arms that the
budget does not reach are named in it, and the same command continues where it ended. Tables, facts
and plots are made from it by ``python -m benchmarks.report_quality``. Several sizes or numbers of
steps run one after the other, each with its share of the budget and its own file: ``--steps 20,50
--output evidence-{tokens}-{steps}.json``.

Rows hold, one entry a caption: ``psnr`` (mean over frames, dB), ``psnr_min`` (worst frame),
``psnr_clip`` and ``ssim``; ``seconds`` (each timing of one caption alone, text encoding and
decoding included), ``dense_seconds`` (dense in the same session), ``batch_seconds`` (of a clip, one
entry a batch), ``density`` (whole generation, dense calls count 1), ``sparse_density`` (its sparse
steps), ``attention_s`` and ``search_s`` (of one caption), ``cache_mb``, ``config``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_arms import QualityArm, read_arms
from benchmarks.quality_estimate import dry_run, predicted_seconds
from benchmarks.quality_evidence import Evidence
from benchmarks.quality_run import Bench, OutOfBudget, Setting
from benchmarks.worst_clips import WorstClip, frames_path, keep
from dit_sparse.pipelines.captions import HELD_OUT_PROMPTS, held_out_scenes
from dit_sparse.pipelines.embedded import load_embedded

# An arm is begun if what it should take, with this margin, is left of the budget.
MARGIN = 1.3


def run(bench: Bench, evidence: Evidence, arms: list[QualityArm], bisect_steps: int) -> None:
    """Runs what the result does not hold yet, in order, as far as the deadline allows."""
    started = time.perf_counter()
    todo = [arm for arm in arms if evidence.row(arm.label) is None]
    if not todo:
        print("nothing to do: the result holds all arms")
        return
    asked = {arm.label for arm in todo}
    skipped = evidence.data["skipped"]
    evidence.data["skipped"] = [skip for skip in skipped if skip["arm"] not in asked]
    session: dict[str, Any] = {"began": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    try:
        dense = bench.dense_row()
    except OutOfBudget:
        for arm in todo:
            evidence.skip(arm.label, "no time left")
        return
    if evidence.row("dense") is None:
        evidence.add(dense)
    clip_s = statistics.median(bench.dense_seconds or [max(dense["batch_seconds"])])
    batch_clip_s = min(dense["batch_seconds"])
    # How much longer than dense clips the arms took.
    ratios: list[float] = []
    for arm in todo:
        began = time.perf_counter()
        as_dense = predicted_seconds(
            arm, bench.setting, clip_s, batch_clip_s, bisect_steps=bisect_steps
        )
        expected = as_dense * (statistics.median(ratios) if ratios else 1.0)
        if arm.missing is not None:
            evidence.skip(arm.label, arm.missing)
        elif began + expected * MARGIN > bench.deadline:
            evidence.skip(arm.label, f"it would take {expected:.0f} s, more than is left")
        else:
            try:
                row, worst = _run_arm(bench, evidence, arm, bisect_steps)
            except OutOfBudget:
                evidence.skip(arm.label, "no time left")
            except _Unreachable as error:
                evidence.skip(arm.label, str(error))
            except Exception as error:  # the other arms are still wanted
                row = {"arm": arm.label, "error": f"{type(error).__name__}: {error}"}
                print(f"{arm.label}: {row['error']}", flush=True)
                evidence.add(row)
            else:
                row["wall_s"] = time.perf_counter() - began
                ratios.append(row["wall_s"] / as_dense)
                evidence.add(row)
                if arm.show and evidence.path is not None:
                    keep(frames_path(evidence.path), worst)
                print(_line(row), flush=True)
    if bench.deadline > time.perf_counter():
        # A clock that went up with the temperature would show here.
        session["dense_seconds_after"] = bench.time_one()
    session |= {
        "dense_seconds": bench.dense_seconds,
        "dense_batch_seconds": dense["batch_seconds"],
        "wall_s": time.perf_counter() - started,
        "arms": len(ratios),
    }
    evidence.data["magcache_ratios"] = bench.ratios or evidence.data.get("magcache_ratios")
    evidence.data["sessions"].append(session)
    evidence.write()


class _Unreachable(Exception):
    """The arm whose density is to be met has none."""


def _run_arm(
    bench: Bench, evidence: Evidence, arm: QualityArm, bisect_steps: int
) -> tuple[dict[str, Any], WorstClip]:
    if arm.is_single and 1 not in bench.references:
        evidence.add(bench.single_row())
    config = None if arm.method is None else arm.method.config
    columns: dict[str, Any] = {}
    if arm.target is not None:
        target, whole = arm.target, isinstance(arm.target, str)
        if isinstance(target, str):
            other = evidence.row(target)
            if other is None or other.get("density") is None:
                raise _Unreachable(f"{target!r} has no density to meet")
            target = other["density"]
        config, columns = bench.at_density(arm, target, whole=whole, steps=bisect_steps)
    row, worst = bench.run(arm, config, warm=arm.target is not None)
    return row | columns, worst


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['arm']}: {statistics.fmean(row['psnr']):.2f} dB"]
    if row.get("density") is not None:
        parts.append(f"density {row['density']:.3f} ({row['sparse_density']:.3f} in sparse steps)")
    if row.get("seconds"):
        parts.append(f"{statistics.median(row['seconds']):.3f} s a clip alone")
    if row.get("batch_seconds"):
        parts.append(f"{min(row['batch_seconds']):.3f} s in a batch")
    return ", ".join([*parts, f"took {row['wall_s']:.1f} s"])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add("--size", default="16x256x256", help="FRAMESxHEIGHTxWIDTH; several with commas")
    add("--captions", type=int, default=20)
    add("--steps", default="30", help="denoising steps; several with commas")
    add("--guidance", type=float, default=3.0)
    add("--batch", type=int, default=10, help="captions generated together")
    add("--seed", type=int, default=0)
    add("--arms", required=True, help="arms and files of arms (*.txt), comma-separated")
    add("--timing-repeats", type=int, default=2, help="timings of one caption an arm")
    add("--bisect-steps", type=int, default=10, help="steps of a try for a density")
    add("--compile", action="store_true", help="with compiled transformer blocks")
    add("--budget-s", type=float, default=float("inf"), help="seconds, once this has started")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default=None, help="bfloat16 on CUDA, float32 on CPU")
    add("--output", help="JSON file to write or to continue; {tokens} and {steps} are filled in")
    add("--dry-run", action="store_true", help="only say what would run and how long")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> list[tuple[Setting, Path | None]]:
    """What to generate, in order, and the file of each.

    Raises:
        ValueError: If two of them would share a file.
    """
    prompts = HELD_OUT_PROMPTS
    if options.captions > len(prompts):
        prompts = tuple(scene.caption() for scene in held_out_scenes(options.captions))
    found: list[tuple[Setting, Path | None]] = []
    for size in options.size.split(","):
        for steps in options.steps.split(","):
            frames, height, width = (int(n) for n in size.split("x"))
            setting = Setting(
                frames,
                height,
                width,
                int(steps),
                options.guidance,
                prompts[: options.captions],
                options.batch,
                options.seed,
                options.dtype or ("float32" if options.device == "cpu" else "bfloat16"),
                options.timing_repeats,
                options.compile,
            )
            path = None
            if options.output is not None:
                tokens = setting.to_dict()["tokens"]
                path = Path(options.output.format(tokens=tokens, steps=setting.steps))
            found.append((setting, path))
    paths = [path for _, path in found if path is not None]
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"expected a file for each size and number of steps, got {options.output!r}; put "
            "{tokens} and {steps} into it"
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    started = time.perf_counter()
    options = parse_arguments(arguments)
    settings = settings_of(options)
    pipe = None
    for number, (setting, path) in enumerate(settings):
        arms = read_arms(options.arms, setting.grid)
        evidence = Evidence.open(path, setting, options.device, check=not options.dry_run)
        if options.dry_run:
            print(f"{setting.frames}x{setting.height}x{setting.width}, {setting.steps} steps")
            dry_run(arms, setting, evidence, options.bisect_steps)
            continue
        if pipe is None:
            pipe = load_embedded(device=options.device, dtype=getattr(torch, setting.dtype))
            pipe.set_progress_bar_config(disable=True)
            if setting.compiled:
                # Shapes are few; hooks of step caches may break graphs.
                pipe.transformer.compile_repeated_blocks(dynamic=False)
        now = time.perf_counter()
        share = (started + options.budget_s - now) / (len(settings) - number)
        run(Bench(pipe, setting, deadline=now + share), evidence, arms, options.bisect_steps)


if __name__ == "__main__":
    main()
