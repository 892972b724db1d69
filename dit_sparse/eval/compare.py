"""Generates the same clips dense and sparse, and measures what changed.

Every arm starts from the same noise, runs under the same instrumentation (the dense arm too), and
is timed after a warm-up, so that compilation and first allocations enter no number.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse.eval.arms import Arm
from dit_sparse.eval.metrics import SSIM_WINDOW, Quality, compare_clips
from dit_sparse.eval.ranks import Ranks
from dit_sparse.eval.video import DIFFERENCE_GAIN, side_by_side, write_mp4

SCHEMA_VERSION = 1
EMBEDDED = "embedded"
DTYPES = ("float32", "bfloat16", "float16")
# Sizes of the embedded model where the user gives none. On a CPU, without guidance (one prediction
# a step instead of two), the default arms take less than five minutes on two cores.
CPU_DEFAULTS = {"steps": 12, "frames": 16, "height": 128, "width": 128, "guidance_scale": 1.0}
CUDA_DEFAULTS = {"steps": 30, "frames": 32, "height": 256, "width": 256, "guidance_scale": 3.0}
# What the arguments are called in the pipelines of diffusers.
ARGUMENTS = {
    "steps": "num_inference_steps",
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "guidance_scale": "guidance_scale",
}
# One step suffices for the model's own attention. A sparse method needs a second one: it searches
# its mask in the first and only then runs its sparse kernel.
DENSE_WARMUP_STEPS = 1
SPARSE_WARMUP_STEPS = 2

StepHook = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        prompts: Captions; every arm runs on each of them. Repeats are dropped.
        arms: From `parse_arms`; the first one is the dense reference.
        output: Folder of the report and the videos.
        model: "embedded", a folder, or a hub id of a diffusers video pipeline.
        steps: Denoising steps; None is the default of the embedded model on this device, or of
            the pipeline of another model. The same holds for the next four.
        frames: Frames.
        height: Pixels.
        width: Pixels.
        guidance_scale: Classifier-free guidance.
        seed: Of the initial noise, drawn on the CPU and therefore the same on every device.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float32 on CPU, bfloat16 on CUDA) or a name out of `DTYPES`.
        fps: Of the videos; None is 8 for the embedded model and 16 otherwise.
        command: How the user asked for it, for the report.
    """

    prompts: tuple[str, ...]
    arms: tuple[Arm, ...]
    output: Path
    model: str = EMBEDDED
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    fps: int | None = None
    command: str = ""

    def resolved(self) -> Request:
        """This request with device, dtype and, for the embedded model, all sizes filled in.

        Raises:
            ValueError: If anything in it cannot work; nothing has been loaded by then.
        """
        device = _resolve_device(self.device)
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        if dtype not in DTYPES:
            raise ValueError(f"expected a dtype out of auto, {', '.join(DTYPES)}; got {dtype!r}")
        values: dict[str, Any] = {}
        if self.model == EMBEDDED:
            defaults = CUDA_DEFAULTS if device.startswith("cuda") else CPU_DEFAULTS
            values = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        fps = (8 if self.model == EMBEDDED else 16) if self.fps is None else self.fps
        prompts = tuple(dict.fromkeys(self.prompts))
        request = replace(self, prompts=prompts, device=device, dtype=dtype, fps=fps, **values)
        request._check()
        return request

    def _check(self) -> None:
        if not self.prompts or any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("expected at least one non-empty prompt; pass --prompt 'a caption'")
        if len(self.arms) < 2 or not self.arms[0].is_dense:
            raise ValueError(
                "expected the dense arm and at least one other, got "
                f"{[arm.label for arm in self.arms]}; add for example adaspa:sparsity=0.8"
            )
        for name in ("steps", "frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and value < SSIM_WINDOW:
                raise ValueError(
                    f"expected {name} of at least {SSIM_WINDOW} pixels (the SSIM window), got "
                    f"{value}; generate larger frames"
                )
        if self.model == EMBEDDED:
            from dit_sparse.pipelines.captions import tokenize
            from dit_sparse.pipelines.codec import PatchCodec

            for prompt in self.prompts:
                tokenize(prompt)
            PatchCodec.latent_shape(self.frames, self.height, self.width)
        elif _looks_like_path(self.model) and not (Path(self.model) / "model_index.json").is_file():
            raise ValueError(
                f"expected --model to be {EMBEDDED!r}, a hub id or a folder with model_index.json, "
                f"got {self.model!r}; save one with pipe.save_pretrained(folder)"
            )
        check_output(self.output)


@dataclass(frozen=True)
class Run:
    """One arm on one prompt.

    Attributes:
        prompt: The caption.
        method: Label of the arm.
        config: The `SparseConfig` as a dict.
        quality: Against the dense clip; None for the dense clip itself.
        density: Share of blocks computed, mean over all attention calls; dense calls count as 1.
        sparse_density: The same over sparse calls only; None without such calls.
        dense_steps: Denoising steps with full attention.
        sparse_steps: Denoising steps with sparse attention.
        attention_s: Seconds in self-attention, mask search included.
        search_s: Seconds in mask search.
        total_s: Seconds of the whole generation, text encoding and decoding included.
        speedup: total_s of dense divided by total_s.
        cache_bytes: Held by the method between steps.
        kernels: Calls by kernel name.
        video: Path of the clip, relative to the report.
        side_by_side: Path of dense | method | difference; None for dense.
    """

    prompt: str
    method: str
    config: dict[str, Any]
    quality: Quality | None
    density: float
    sparse_density: float | None
    dense_steps: int
    sparse_steps: int
    attention_s: float
    search_s: float
    total_s: float
    speedup: float
    cache_bytes: int
    kernels: dict[str, int]
    video: str
    side_by_side: str | None

    def to_dict(self) -> dict[str, Any]:
        """The entry of report.json."""
        quality = self.quality
        return {
            "prompt": self.prompt,
            "method": self.method,
            "psnr_mean": quality and quality.psnr_mean,
            "psnr_min": quality and quality.psnr_min,
            "psnr_clip": quality and quality.psnr_clip,
            "ssim": quality and quality.ssim_mean,
            "identical_frames": quality and quality.identical_frames,
            "density": self.density,
            "sparse_density": self.sparse_density,
            "dense_steps": self.dense_steps,
            "sparse_steps": self.sparse_steps,
            "attention_s": self.attention_s,
            "search_s": self.search_s,
            "total_s": self.total_s,
            "speedup": self.speedup,
            "cache_mb": self.cache_bytes / 1e6,
            "kernels": self.kernels,
            "config": self.config,
            "video": self.video,
            "side_by_side": self.side_by_side,
            "psnr_frames": quality and list(quality.psnr),
            "ssim_frames": quality and list(quality.ssim),
        }


@dataclass
class Comparison:
    """The result of `run_comparison`.

    Attributes:
        request: What was compared, with nothing left to defaults.
        machine: Hardware and versions.
        created: UTC time, ISO 8601.
        runs: In the order they ran: for every prompt dense, then the other arms.
    """

    request: Request
    machine: dict[str, Any]
    created: str
    runs: list[Run] = field(default_factory=list)

    @property
    def json_path(self) -> Path:
        """Where report.json is."""
        return self.request.output / "report.json"

    @property
    def html_path(self) -> Path:
        """Where report.html is."""
        return self.request.output / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json before infinities are spelled out."""
        request = self.request
        names = ("steps", "seed", "height", "width", "frames", "guidance_scale", "dtype", "device")
        settings = {name: getattr(request, name) for name in names}
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "command": request.command,
            "machine": self.machine,
            "model": request.model,
            "settings": settings | {"fps": request.fps, "difference_gain": DIFFERENCE_GAIN},
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_json(self) -> str:
        """Valid JSON: infinity is the string "inf", an undefined number is null."""
        return json.dumps(_jsonable(self.to_dict()), indent=2, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def check_output(folder: Path) -> None:
    """Creates ``folder`` and makes sure that files can be written there.

    Raises:
        ValueError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"expected a writable output folder, got {str(folder)!r} ({error.strerror}); pass "
            "another --output"
        ) from error


def _looks_like_path(model: str) -> bool:
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device out of auto, cpu, cuda, cuda:N; got {device!r}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"expected an available device, got {device!r} with {torch.cuda.device_count()} CUDA "
            "devices visible; use --device cpu or install a CUDA build of torch"
        )
    return device


def load_pipeline(model: str, device: str, dtype: str) -> Any:
    """Loads the embedded model or any diffusers pipeline, without its progress bars.

    Args:
        model: "embedded", a folder or a hub id.
        device: Torch device.
        dtype: Name of a torch dtype.

    Raises:
        ValueError: If the model cannot be loaded or makes no video.
    """
    torch_dtype = getattr(torch, dtype)
    if model == EMBEDDED:
        from dit_sparse.pipelines.embedded import load_embedded

        try:
            pipe = load_embedded(device=device, dtype=torch_dtype)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
    else:
        from diffusers import DiffusionPipeline

        from dit_sparse.pipelines.embedded import dtype_argument

        try:
            pipe = DiffusionPipeline.from_pretrained(model, **dtype_argument(torch_dtype)).to(
                device
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a diffusers pipeline at {model!r}, got: {error}") from error
    return pipe


def _with_pipeline_defaults(request: Request, pipe: Any) -> Request:
    parameters = inspect.signature(pipe.__call__).parameters
    needed = {"num_inference_steps", "num_frames", "generator", "callback_on_step_end"}
    missing = sorted(needed - set(parameters))
    if missing:
        raise ValueError(
            f"expected a video pipeline of diffusers, got {type(pipe).__name__}, whose call does "
            f"not take {missing}; pass a text-to-video model"
        )
    values: dict[str, Any] = {}
    for name, argument in ARGUMENTS.items():
        if getattr(request, name) is None and argument in parameters:
            default = parameters[argument].default
            values[name] = None if default is inspect.Parameter.empty else default
    request = replace(request, **values)
    if request.steps is None:
        raise ValueError(
            f"expected a number of steps, got none and {type(pipe).__name__} has no default; pass "
            "--steps"
        )
    return request


def run_comparison(
    request: Request,
    *,
    pipe: Any = None,
    enable: Callable[[Any, Any], Any] | None = None,
    on_step: StepHook | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Comparison:
    """Runs every arm on every prompt; files are written as soon as each arm is done.

    Under ``accelerate launch`` the processes share the prompts; the first one writes the report.

    Args:
        request: What to compare.
        pipe: A loaded pipeline instead of `request.model`.
        enable: Replaces `enable_sparse_attention`.
        on_step: Called as ``on_step(prompt, label, done_steps, steps)`` after every step.
        on_stage: Called with a line of text before each untimed stage.

    Returns:
        The results, those of other processes included; report.json, report.html and the videos are
        in `request.output`.

    Raises:
        ValueError: On a request that cannot work, before anything is generated.
    """
    from dit_sparse.eval.html import write_html

    stage = on_stage or (lambda text: None)
    device = request.resolved().device
    ranks = Ranks.started(device)
    placed = replace(request, device=ranks.place(device))
    engine = prepare(placed, pipe=pipe, enable=enable, on_step=on_step, on_stage=on_stage)
    request = replace(engine.request, device=device)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = machine_info(engine.request.device) | {"processes": ranks.count}
    result = Comparison(request, machine, created)
    prompts = ranks.own(request.prompts)
    for arm in request.arms if prompts else ():
        stage(f"warming up {arm.label}")
        engine.warm_up(arm)
    for index, prompt in prompts:
        reference: NDArray | None = None
        dense_s = 0.0
        for arm in request.arms:
            frames, run = engine.generate(arm, prompt, index, reference, dense_s)
            if arm.is_dense:
                reference, dense_s = frames, run.total_s
            result.runs.append(run)
            result.request = replace(
                request, frames=len(frames), height=frames.shape[1], width=frames.shape[2]
            )
            if ranks.index == 0:
                # After each arm, so that an interrupted comparison keeps what it has measured.
                result.json_path.write_text(result.to_json() + "\n", encoding="utf-8")
    if ranks.count > 1:
        stage("waiting for the other processes")
        # Sorting keeps the order of the arms of one prompt.
        runs = ranks.gather(result.runs)
        result.runs = sorted(runs, key=lambda run: request.prompts.index(run.prompt))
    if ranks.index == 0:
        stage("writing report.html")
        result.json_path.write_text(result.to_json() + "\n", encoding="utf-8")
        write_html(result.html_path, json.loads(result.to_json()))
    return result


def prepare(
    request: Request,
    *,
    pipe: Any = None,
    enable: Callable[[Any, Any], Any] | None = None,
    on_step: StepHook | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> Engine:
    """Loads what `request` needs; arguments as in `run_comparison`."""
    if enable is None:
        from dit_sparse import enable_sparse_attention

        enable = enable_sparse_attention
    request = request.resolved()
    if pipe is None:
        if on_stage is not None:
            on_stage(f"loading {request.model}")
        pipe = load_pipeline(request.model, request.device, request.dtype)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    request = _with_pipeline_defaults(request, pipe)
    assert request.steps is not None and request.fps is not None
    return Engine(request, pipe, enable, on_step, steps=request.steps, fps=request.fps)


@dataclass
class Engine:
    """Generates the clips of a request with one loaded pipeline."""

    request: Request
    pipe: Any
    enable: Callable[[Any, Any], Any]
    on_step: StepHook | None
    steps: int
    fps: int

    def warm_up(self, arm: Arm) -> None:
        """Runs a few untimed steps; the reference decodes too, once for all arms."""
        steps = DENSE_WARMUP_STEPS if arm.is_dense else SPARSE_WARMUP_STEPS
        # So few steps may all be dense by the arm's schedule, which is no loss here.
        handle = self.enable(self.pipe, replace(arm.config, strict=False))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="attention of this .* was dense in all")
                self._call(
                    self.request.prompts[0],
                    min(steps, self.steps),
                    output_type="np" if arm.is_dense else "latent",
                )
        finally:
            handle.remove()

    def report(self, arm: Arm) -> Any:
        """What ``arm`` does on the first prompt (a `Report`), without decoding the clip."""
        handle = self.enable(self.pipe, arm.config)
        try:
            self._call(self.request.prompts[0], self.steps, output_type="latent")
            return handle.report()
        finally:
            handle.remove()

    def generate(
        self, arm: Arm, prompt: str, index: int, reference: NDArray | None, dense_s: float
    ) -> tuple[NDArray, Run]:
        """Generates, times and compares one clip, and writes its videos."""
        request = self.request
        handle = self.enable(self.pipe, arm.config)
        try:
            self._synchronise()
            started = time.perf_counter()
            frames = self._call(prompt, self.steps, hook_label=arm.label)
            self._synchronise()
            total_s = time.perf_counter() - started
            report = handle.report()
        finally:
            handle.remove()
        quality = None if reference is None else compare_clips(frames, reference)
        stem = f"videos/{index + 1:02d}-{arm.slug}"
        video, pair = f"{stem}.mp4", None
        write_mp4(request.output / video, frames, self.fps)
        if reference is not None:
            pair = f"{stem}-vs-dense.mp4"
            panels = side_by_side(reference, frames, arm.label)
            write_mp4(request.output / pair, panels, self.fps)
        sparse_density = report.sparse_density if report.sparse_steps else None
        run = Run(
            prompt=prompt,
            method=arm.label,
            config=arm.config.to_dict(),
            quality=quality,
            density=float(report.density),
            sparse_density=None if sparse_density is None else float(sparse_density),
            dense_steps=int(report.dense_steps),
            sparse_steps=int(report.sparse_steps),
            attention_s=float(report.attention_seconds),
            search_s=float(report.search_seconds),
            total_s=total_s,
            speedup=(dense_s or total_s) / total_s,
            cache_bytes=int(report.cache_bytes),
            kernels=dict(report.kernels),
            video=video,
            side_by_side=pair,
        )
        return frames, run

    def _call(
        self, prompt: str, steps: int, output_type: str = "np", hook_label: str | None = None
    ) -> NDArray:
        request = self.request

        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict) -> dict:
            if hook_label is not None and self.on_step is not None:
                self.on_step(prompt, hook_label, index + 1, steps)
            return tensors

        arguments = {
            argument: getattr(request, name)
            for name, argument in ARGUMENTS.items()
            if getattr(request, name) is not None
        }
        output = self.pipe(
            prompt=prompt,
            **arguments | {"num_inference_steps": steps},
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type=output_type,
            callback_on_step_end=after_step,
        )
        frames = output.frames[0]
        if output_type == "latent":
            return frames
        # Some pipelines return one array, others a list of frames.
        return np.stack([np.asarray(frame, dtype=np.float32) for frame in frames])

    def _synchronise(self) -> None:
        if self.request.device.startswith("cuda"):
            torch.cuda.synchronize(self.request.device)


def machine_info(device: str) -> dict[str, Any]:
    """Hardware and versions that a timing depends on.

    Args:
        device: The device of the comparison.
    """
    gpu = driver = None
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_name(device)
        driver = _driver_version()
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "triton": _version("triton"),
        "dit_sparse": _version("dit-sparse"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.splitlines()[0].strip() if text.strip() else None


__all__ = ["Comparison", "Request", "Run", "load_pipeline", "run_comparison"]
