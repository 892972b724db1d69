"""Quality against time on the embedded model: many captions, many arms, paired statistics.

``python -m benchmarks.quality --size 16x256x256 --captions 20 --output
benchmarks/results/quality-8k.json`` runs every arm of ``--arms`` (``ARMS`` if not given) on the
held-out captions from the same noise, on this machine's GPU or CPU.

An arm is ``dense``, a method as `dit-sparse compare` takes it (``adaspa:sparsity=0.8``), a step
cache of diffusers (``fbcache:threshold=0.1``, ``taylorseer:interval=4``,
``magcache:threshold=0.1``) or a cache and a method joined by ``+``.

Rows: ``arm, psnr[], psnr_min[], ssim[]`` (one entry a caption, against dense), ``density``,
``seconds`` (of a caption, all of the generation), ``attention_s``, ``search_s``, ``speedup`` over
dense in the same run, ``cache_mb``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_sparse import SparseProcessor
from dit_sparse.eval.arms import Arm, parse_arm, split_entries
from dit_sparse.eval.compare import machine_info
from dit_sparse.eval.metrics import compare_clips
from dit_sparse.eval.paired import bootstrap_mean, paired_difference
from dit_sparse.pipelines.captions import HELD_OUT_PROMPTS, held_out_scenes
from dit_sparse.pipelines.codec import PatchCodec
from dit_sparse.pipelines.embedded import load_embedded

ARMS = (
    "dense",
    "noise-floor",
    "adaspa:sparsity=0.7",
    "adaspa:sparsity=0.8",
    "adaspa:sparsity=0.9",
    "compensated_delta:density=0.05",
    "compensated_delta:density=0.1",
    "compensated_delta:density=0.2",
)


@dataclass(frozen=True)
class QualityArm:
    """One way to generate: a step cache, a sparse method, both, or neither (dense)."""

    label: str
    method: Arm | None
    cache: tuple[str, float] | None

    @classmethod
    def parse(cls, text: str) -> QualityArm:
        """Reads an arm as the module's docstring describes it."""
        method, cache = None, None
        for piece in text.split("+"):
            name, _, value = piece.partition(":")
            if name in CACHES:
                key, _, number = value.partition("=")
                if key != CACHES[name]:
                    raise ValueError(f"expected {name}:{CACHES[name]}=NUMBER, got {piece!r}")
                cache = (name, float(number))
            elif piece != "dense":
                method = parse_arm(piece)
        return cls(text, method, cache)


CACHES = {"fbcache": "threshold", "taylorseer": "interval", "magcache": "threshold"}


def cache_config(name: str, value: float, steps: int, ratios: list[float] | None) -> Any:
    """The diffusers configuration of a step cache."""
    from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    if name == "fbcache":
        return FirstBlockCacheConfig(threshold=value)
    if name == "taylorseer":
        # Its default identifiers match no module of Wan.
        return TaylorSeerCacheConfig(
            cache_interval=int(value),
            disable_cache_before_step=3,
            cache_identifiers=[r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"],
        )
    if ratios is None:
        raise ValueError("magcache needs the ratios of a calibration run")
    return MagCacheConfig(
        threshold=value, max_skip_steps=4, num_inference_steps=steps, mag_ratios=ratios
    )


@contextmanager
def switched_on(
    pipe: Any, arm: QualityArm, steps: int, ratios: list[float] | None
) -> Iterator[SparseProcessor | None]:
    """The arm's cache and method on the pipeline's transformer, and off again."""
    processor = None
    if arm.cache is not None:
        pipe.transformer.enable_cache(cache_config(*arm.cache, steps, ratios))
    if arm.method is not None:
        processor = SparseProcessor(arm.method.config).install(pipe.transformer, pipe)
    try:
        yield processor
    finally:
        if processor is not None:
            processor.remove()
        if arm.cache is not None:
            pipe.transformer.disable_cache()


@dataclass(frozen=True)
class Setting:
    """What is generated: sizes, steps, captions."""

    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    captions: tuple[str, ...]
    batch: int
    seed: int


def generate(pipe: Any, setting: Setting, captions: tuple[str, ...], first: int, steps: int) -> Any:
    """Clips of ``captions``, each from the noise of its own number."""
    return pipe(
        list(captions),
        height=setting.height,
        width=setting.width,
        num_frames=setting.frames,
        num_inference_steps=steps,
        guidance_scale=setting.guidance,
        generator=[
            torch.Generator("cpu").manual_seed(setting.seed + first + i)
            for i in range(len(captions))
        ],
        output_type="np",
    ).frames


def run_arm(
    pipe: Any, setting: Setting, arm: QualityArm, ratios: list[float] | None
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Generates and times all captions under one arm."""
    cuda = pipe.device.type == "cuda"
    clips: list[np.ndarray] = []
    seconds = attention = search = 0.0
    density: list[float] = []
    cache_bytes = 0
    with switched_on(pipe, arm, setting.steps, ratios) as processor:
        # Compiles kernels and fills allocators: three steps reach every phase of a method.
        warm = setting.captions[: setting.batch]
        generate(pipe, setting, warm, 0, min(3, setting.steps))
        for first in range(0, len(setting.captions), setting.batch):
            captions = setting.captions[first : first + setting.batch]
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            frames = generate(pipe, setting, captions, first, setting.steps)
            if cuda:
                torch.cuda.synchronize()
            seconds += time.perf_counter() - start
            clips += list(frames)
            if processor is not None:
                report = processor.report()
                attention += report.attention_seconds
                search += report.search_seconds
                density.append(report.density)
                cache_bytes = max(cache_bytes, report.cache_bytes)
    count = len(setting.captions)
    row = {
        "arm": arm.label,
        "seconds": seconds / count,
        "attention_s": attention / count if density else None,
        "search_s": search / count if density else None,
        "density": sum(density) / len(density) if density else None,
        "cache_mb": cache_bytes / 1e6,
    }
    return clips, row


def run(setting: Setting, arms: list[QualityArm], device: str, dtype: str) -> dict[str, Any]:
    """Runs all arms; the first row is dense."""
    pipe = load_embedded(device=device, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    ratios = None
    if any(arm.cache is not None and arm.cache[0] == "magcache" for arm in arms):
        ratios = magcache_ratios(pipe, setting)
    dense = QualityArm("dense", None, None)
    reference, dense_row = run_arm(pipe, setting, dense, ratios)
    rows = [dense_row | {"speedup": 1.0}]
    clips: dict[str, list[np.ndarray]] = {}
    for arm in arms:
        if arm.label == "dense":
            continue
        try:
            clips[arm.label], row = run_arm(pipe, setting, arm, ratios)
        except Exception as error:  # the other arms are still wanted
            row = {"arm": arm.label, "error": f"{type(error).__name__}: {error}"}
            print(f"{arm.label}: {row['error']}", flush=True)
        else:
            row["speedup"] = dense_row["seconds"] / row["seconds"]
            print(f"{arm.label}: {row['seconds']:.3f} s a clip, {row['speedup']:.2f}x", flush=True)
        rows.append(row)
    found = qualities(clips, reference, device)
    for row in rows:
        row |= found.get(row["arm"], {})
    tokens = PatchCodec.latent_shape(setting.frames, setting.height, setting.width)
    return {
        "machine": machine_info(device),
        "settings": {**setting.__dict__, "tokens": int(np.prod(tokens)), "dtype": dtype},
        "rows": rows,
    }


def qualities(
    clips: dict[str, list[np.ndarray]], reference: list[np.ndarray], device: str
) -> dict[str, dict[str, list[float]]]:
    """PSNR and SSIM of every clip, by arm; after all arms, so that no timing shares a processor."""
    # Spawned, since a fork would copy locks that torch's threads hold.
    workers = max(1, (os.cpu_count() or 2) - 2) if device != "cpu" else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {arm: pool.map(compare_clips, made, reference) for arm, made in clips.items()}
        found = {arm: list(results) for arm, results in waiting.items()}
    return {
        arm: {
            "psnr": [min(q.psnr_mean, 999.0) for q in results],
            "psnr_min": [min(q.psnr_min, 999.0) for q in results],
            "ssim": [q.ssim_mean for q in results],
        }
        for arm, results in found.items()
    }


def magcache_ratios(pipe: Any, setting: Setting) -> list[float]:
    """MagCache's ratios for this model and number of steps, calibrated on one caption."""
    import ast
    import logging
    import re

    from diffusers.hooks import MagCacheConfig

    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("diffusers.hooks.mag_cache")
    listener, level = Listener(), logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=setting.steps))
    try:
        generate(pipe, setting, setting.captions[:1], 0, setting.steps)
    finally:
        pipe.transformer.disable_cache()
        logger.removeHandler(listener)
        logger.setLevel(level)
    found = [m for line in lines for m in re.findall(r"\[[-\d., e]+\]", line)]
    if not found:
        raise RuntimeError("MagCache's calibration printed no ratios")
    return ast.literal_eval(found[0])


def table(result: dict[str, Any], against: str | None = None) -> str:
    """A Markdown table of the rows with bootstrap intervals.

    Args:
        result: From :func:`run`.
        against: Arm whose PSNR is subtracted clip by clip in one more column.
    """
    rows = {row["arm"]: row for row in result["rows"]}
    head = ["arm", "PSNR (95 %)", "worst clip", "SSIM", "density", "s a clip", "speed-up"]
    lines = ["| " + " | ".join([*head, *([f"PSNR - {against}"] if against else [])]) + " |"]
    lines.append("|" + " --- |" * (len(head) + bool(against)))
    for row in result["rows"]:
        if "psnr" not in row:
            continue
        psnr = bootstrap_mean(row["psnr"])
        cells = [
            f"`{row['arm']}`",
            f"{psnr.mean:.2f} ({psnr.low:.2f}–{psnr.high:.2f})",
            f"{min(row['psnr']):.2f}",
            f"{sum(row['ssim']) / len(row['ssim']):.4f}",
            "–" if row["density"] is None else f"{row['density']:.3f}",
            f"{row['seconds']:.2f}",
            f"{row['speedup']:.2f}x",
        ]
        if against:
            gap = paired_difference(row["psnr"], rows[against]["psnr"])
            cells.append(f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--size", default="16x256x256", help="FRAMESxHEIGHTxWIDTH")
    add("--captions", type=int, default=20)
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=3.0)
    add("--batch", type=int, default=4, help="captions generated together")
    add("--seed", type=int, default=0)
    add("--arms", default=",".join(ARMS), help="comma-separated, or a text file with one a line")
    add("--against", help="arm to subtract in the printed table")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default=None, help="bfloat16 on CUDA, float32 on CPU")
    add("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    frames, height, width = (int(n) for n in options.size.split("x"))
    prompts = HELD_OUT_PROMPTS
    if options.captions > len(prompts):
        prompts = tuple(scene.caption() for scene in held_out_scenes(options.captions))
    setting = Setting(
        frames, height, width, options.steps, options.guidance,
        prompts[: options.captions], options.batch, options.seed,
    )  # fmt: skip
    text = options.arms
    if Path(text).is_file():
        text = ",".join(Path(text).read_text(encoding="utf-8").split())
    arms = [QualityArm.parse(entry) for entry in split_entries(text)]
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    result = run(setting, arms, options.device, dtype)
    print(table(result, options.against))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
