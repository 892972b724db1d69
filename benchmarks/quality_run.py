"""Generates under one arm, times it, and compares it with dense; everything stays on the device.

Quality and time are measured apart. Quality comes from batches of captions. Time is that of one
caption at a time, after a warm-up; batches are timed as well, since a small model that is given one
clip spends its time on launches. Nothing else runs beside either: metrics are computed between
generations.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality_arms import QualityArm
from benchmarks.step_caches import cache_config, magcache_ratios, switched_on
from benchmarks.torch_metrics import ClipQuality, compare
from benchmarks.worst_clips import WorstClip
from dit_sparse import SparseConfig
from dit_sparse.eval.paired import PSNR_CEILING
from dit_sparse.eval.protocol import bisect_density, sparse_step_density
from dit_sparse.pipelines.codec import PatchCodec

# Enough that every phase of a method is reached behind its dense steps.
WARMUP_STEPS = 10
MOST_TRIES = 8


class OutOfBudget(Exception):
    """The time that was given is used up."""


@dataclass(frozen=True)
class Setting:
    """What is generated.

    Attributes:
        frames, height, width: Of the clips, in pixels.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        captions: One clip each, from the noise of its own number.
        batch: Captions generated together where an arm decides for each clip by itself.
        seed: Of the first caption's noise, drawn on the CPU.
        dtype: Of the weights.
        repeats: Timings of an arm with one caption; 0 times nothing.
        compiled: Whether the transformer's blocks are compiled.
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance: float
    captions: tuple[str, ...]
    batch: int
    seed: int
    dtype: str
    repeats: int
    compiled: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent (frames, height, width), which is that of the tokens."""
        return PatchCodec.latent_shape(self.frames, self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the result."""
        return {
            **asdict(self),
            "captions": list(self.captions),
            "grid": list(self.grid),
            "tokens": int(np.prod(self.grid)),
        }


@dataclass
class Bench:
    """One loaded pipeline, the dense clips that everything is compared with, and the clock.

    Attributes:
        pipe: The embedded model's pipeline.
        setting: What is generated.
        deadline: ``time.perf_counter()`` value after which no batch is begun.
        dense_seconds: Timings of one caption under dense attention.
        dense_batch_seconds: Of a clip in each dense batch.
        references: Dense clips on the device, by the batch they were made in.
        ratios: MagCache's, once asked for.
    """

    pipe: Any
    setting: Setting
    deadline: float = float("inf")
    dense_seconds: list[float] = field(default_factory=list)
    dense_batch_seconds: list[float] = field(default_factory=list)
    references: dict[int, Tensor] = field(default_factory=dict)
    ratios: list[float] | None = None

    def dense_row(self) -> dict[str, Any]:
        """Makes the dense clips of the usual batch; their row."""
        if self.setting.repeats or self.pipe.device.type == "cuda":
            self._warm_up(self.setting.batch)
        self.dense_seconds = self.time_one()
        clips, self.dense_batch_seconds = [], []
        for first in range(0, len(self.setting.captions), self.setting.batch):
            found, seconds = self._timed(first, self.setting.batch)
            clips.append(found)
            self.dense_batch_seconds.append(seconds / len(found))
        self.references[self.setting.batch] = torch.cat(clips)
        return {
            "arm": "dense",
            "captions": len(self.setting.captions),
            "batch": self.setting.batch,
            "density": 1.0,
            "seconds": self.dense_seconds,
            "batch_seconds": self.dense_batch_seconds,
        }

    def single_row(self) -> dict[str, Any]:
        """Makes the dense clips one by one: what the size of a batch alone changes, and a timing.

        Arms that are generated one by one are compared with these.
        """
        clips, seconds, found = [], [], _Qualities()
        for first in range(len(self.setting.captions)):
            clip, taken = self._timed(first, 1)
            clips.append(clip)
            seconds.append(taken)
            found.add(compare(clip, self.references[self.setting.batch][first : first + 1]))
        self.references[1] = torch.cat(clips)
        return {
            "arm": "dense, one by one",
            "captions": len(clips),
            "batch": 1,
            "density": 1.0,
            "seconds": seconds,
            **found.columns(),
        }

    def run(
        self, arm: QualityArm, config: SparseConfig | None, warm: bool = False
    ) -> tuple[dict[str, Any], WorstClip]:
        """Row of an arm, and its worst clip.

        Args:
            arm: The arm.
            config: Its method with the density already found, or None.
            warm: Whether it has just run, so that its kernels are compiled.

        Raises:
            OutOfBudget: If there is no time for all of it.
        """
        setting = self.setting
        batch = 1 if arm.is_single else setting.batch
        count = min(len(setting.captions), arm.captions or len(setting.captions))
        cache = None
        if arm.cache is not None:
            if arm.cache[0] == "magcache" and self.ratios is None:
                self.ratios = magcache_ratios(
                    self.pipe.transformer, setting.steps, lambda: self._clips(0, 1, setting.steps)
                )
            cache = cache_config(*arm.cache, setting.steps, self.ratios)
        row: dict[str, Any] = {"arm": arm.label, "captions": count, "batch": batch}
        worst: WorstClip | None = None
        found, batch_seconds, densities = _Qualities(), [], []
        with switched_on(self.pipe, cache, config) as processor:
            # On CUDA batches are timed in any case, and must not hold the compiling of kernels.
            if (not warm or setting.compiled) and (
                setting.repeats or self.pipe.device.type == "cuda"
            ):
                self._warm_up(batch)
            if setting.repeats and batch > 1:
                row["seconds"] = self.time_one()
                row |= _report_of_one(processor)
            for first in range(0, count, batch):
                size = min(batch, count - first)
                clips, seconds = self._timed(first, size)
                batch_seconds.append(seconds / size)
                reference = self.references[batch][first : first + size]
                quality = compare(clips, reference)
                found.add(quality)
                lowest = min(range(size), key=quality.psnr.__getitem__)
                if worst is None or quality.psnr[lowest] < worst.psnr:
                    middle = setting.frames // 2
                    worst = WorstClip(
                        arm.label,
                        setting.captions[first + lowest],
                        quality.psnr[lowest],
                        _to_uint8(reference[lowest, middle]),
                        _to_uint8(clips[lowest, middle]),
                    )
                if processor is not None:
                    report = processor.report()
                    densities.append((size, report.density, sparse_step_density(report)))
                    row["cache_mb"] = max(row.get("cache_mb", 0.0), report.cache_bytes / 1e6)
                    row["kernels"], row["notes"] = report.kernels, report.notes
            if setting.repeats and batch == 1:
                row["seconds"] = batch_seconds
                row |= _report_of_one(processor)
        if densities:
            row["density"] = sum(n * whole for n, whole, _ in densities) / count
            row["sparse_density"] = sum(n * sparse for n, _, sparse in densities) / count
        if batch > 1:
            row["batch_seconds"] = batch_seconds
        row["config"] = None if config is None else config.to_dict()
        row["dense_seconds"] = self.dense_seconds
        row["dense_batch_seconds"] = self.dense_batch_seconds
        assert worst is not None
        return row | found.columns(), worst

    def at_density(
        self, arm: QualityArm, target: float, *, whole: bool, steps: int
    ) -> tuple[SparseConfig, dict[str, Any]]:
        """The configuration of an arm that computes ``target`` on the first caption.

        Args:
            arm: Its method is turned.
            target: Density.
            whole: Whether it is that of the whole generation rather than of its sparse steps.
            steps: Denoising steps of a try; a whole generation always takes all.

        Returns:
            The configuration, and columns for the row: target and what was tried.
        """
        assert arm.method is not None
        base = arm.method.config
        steps = self.setting.steps if whole else min(steps, self.setting.steps)

        def make(share: float) -> SparseConfig:
            return replace(base, method=base.method.at_budget(share))

        def measure(config: SparseConfig) -> float:
            with switched_on(self.pipe, None, config) as processor:
                assert processor is not None
                self._clips(0, 1, steps, output_type="latent")
                report = processor.report()
            return report.density if whole else sparse_step_density(report)

        # A hundredth is nothing at .3, and a fifth of what is computed at .05.
        tolerance = min(0.01, target / 10)
        matched = bisect_density(make, target, measure, tolerance=tolerance, most_tries=MOST_TRIES)
        tries = [list(pair) for pair in matched.tries]
        return matched.config, {"target": target, "target_is_whole": whole, "tries": tries}

    def _warm_up(self, batch: int) -> None:
        """Compiles kernels, and blocks in all shapes that are timed later."""
        steps = min(WARMUP_STEPS, self.setting.steps)
        if self.setting.compiled:
            # What was compiled for another arm is of no use, and counts towards dynamo's limit.
            torch.compiler.reset()
            if batch > 1:
                self._clips(0, batch, steps)
        self._clips(0, 1, steps)

    def time_one(self) -> list[float]:
        """Seconds of the first caption alone, as often as the setting says."""
        return [self._timed(0, 1)[1] for _ in range(self.setting.repeats)]

    def _timed(self, first: int, count: int) -> tuple[Tensor, float]:
        if time.perf_counter() > self.deadline:
            raise OutOfBudget
        self._synchronise()
        start = time.perf_counter()
        clips = self._clips(first, count, self.setting.steps)
        self._synchronise()
        return clips, time.perf_counter() - start

    def _clips(self, first: int, count: int, steps: int, output_type: str = "pt") -> Tensor:
        """Clips ``[count, frames, 3, height, width]`` of captions from ``first`` on."""
        setting = self.setting
        captions = list(setting.captions[first : first + count])
        return self.pipe(
            captions,
            height=setting.height,
            width=setting.width,
            num_frames=setting.frames,
            num_inference_steps=steps,
            guidance_scale=setting.guidance,
            generator=[
                torch.Generator("cpu").manual_seed(setting.seed + first + i)
                for i in range(len(captions))
            ],
            output_type=output_type,
        ).frames

    def _synchronise(self) -> None:
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class _Qualities:
    """Metrics of the clips so far; identical clips count as ``PSNR_CEILING``."""

    psnr: list[float] = field(default_factory=list)
    psnr_min: list[float] = field(default_factory=list)
    psnr_clip: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    def add(self, quality: ClipQuality) -> None:
        for name, values in asdict(quality).items():
            ceiling = PSNR_CEILING if name != "ssim" else 1.0
            getattr(self, name).extend(min(value, ceiling) for value in values)

    def columns(self) -> dict[str, list[float]]:
        return asdict(self)


def _report_of_one(processor: Any) -> dict[str, float]:
    """Time in attention and in searches of the generation of one caption that just ended."""
    if processor is None:
        return {}
    report = processor.report()
    return {"attention_s": report.attention_seconds, "search_s": report.search_seconds}


def _to_uint8(frame: Tensor) -> np.ndarray:
    return (frame.permute(1, 2, 0) * 255 + 0.5).to(torch.uint8).cpu().numpy()
