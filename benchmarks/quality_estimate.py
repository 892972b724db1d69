"""How long an evidence run will take."""

from __future__ import annotations

import statistics

from benchmarks.quality_arms import QualityArm
from benchmarks.quality_evidence import Evidence
from benchmarks.quality_run import WARMUP_STEPS, Setting

# What --dry-run expects of one clip at 30 steps before anything was measured: the launches of
# sparse attention on an H100, and its arithmetic for a clip of a batch at 8,192 tokens.
GUESSED_CLIP_S, GUESSED_BATCH_CLIP_S = 1.1, 0.2


def predicted_seconds(
    arm: QualityArm,
    setting: Setting,
    clip_s: float,
    batch_clip_s: float,
    *,
    bisect_steps: int,
    tries: float = 3,
) -> float:
    """Seconds that an arm will take.

    Args:
        arm: The arm.
        setting: What is generated.
        clip_s: Seconds of a clip alone.
        batch_clip_s: Seconds of a clip in a batch.
        bisect_steps: Denoising steps of a try for a density.
        tries: How many of them are expected.
    """
    count = min(len(setting.captions), arm.captions or len(setting.captions))
    step_s = clip_s / setting.steps
    seconds = 0.0
    if setting.repeats and arm.target is None:
        seconds += step_s * min(WARMUP_STEPS, setting.steps)
    if arm.is_single:
        seconds += count * clip_s
    else:
        seconds += setting.repeats * clip_s + count * batch_clip_s
    if isinstance(arm.target, float):
        seconds += tries * step_s * min(bisect_steps, setting.steps)
    elif arm.target is not None:
        seconds += tries * clip_s
    return seconds


def dry_run(
    arms: list[QualityArm], setting: Setting, evidence: Evidence, bisect_steps: int
) -> float:
    """Prints what would run and what it should take; returns the seconds."""
    clip_s = GUESSED_CLIP_S * setting.steps / 30
    batch_clip_s = GUESSED_BATCH_CLIP_S * setting.steps / 30 * setting.to_dict()["tokens"] / 8192
    done = [row for row in evidence.data["rows"] if row.get("wall_s")]
    if done:
        timed = [statistics.median(row["seconds"]) for row in done if row.get("seconds")]
        batched = [min(row["batch_seconds"]) for row in done if row.get("batch_seconds")]
        clip_s = statistics.median(timed or [clip_s])
        batch_clip_s = statistics.median(batched or [batch_clip_s])
    total = GUESSED_CLIP_S + len(setting.captions) * batch_clip_s
    single = False
    for arm in arms:
        if evidence.row(arm.label) is not None:
            print(f"{'done':>8}  {arm.label}")
            continue
        if arm.missing is not None:
            print(f"{'skipped':>8}  {arm.label}: {arm.missing}")
            continue
        seconds = predicted_seconds(arm, setting, clip_s, batch_clip_s, bisect_steps=bisect_steps)
        if arm.is_single and not single:
            single, seconds = True, seconds + len(setting.captions) * clip_s
        total += seconds
        print(f"{seconds:6.1f} s  {arm.label}{' (one by one)' if arm.is_single else ''}")
    print(
        f"{total:6.0f} s in all, loading and compiling not counted "
        f"({'measured' if done else 'guessed'}: {clip_s:.2f} s a clip alone, {batch_clip_s:.2f} s "
        "in a batch)"
    )
    return total
