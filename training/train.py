"""Trains the embedded text-to-video model on generated clips.

Example:
    python -m training.train --atlas atlas.npz --output runs/emoji \\
        --stages "codec:90,16x128x128:96:420" --export runs/emoji/model

A run is a list of stages, each limited by wall-clock seconds, so that it fits a machine that is
only available for a known time. `--resume` goes on from the last checkpoint: inside an unfinished
list of the same stages, otherwise with a new list on top of the trained weights. `--init` starts
from an exported pipeline folder, such as the shipped one, with fresh optimisers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from dit_sparse.pipelines.codec import PatchCodec
from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline
from dit_sparse.pipelines.text_encoder import PAD_ID, CaptionEncoder

SHIFT = 3.0
TRAIN_TIMESTEPS = 1000
LOG_EVERY = 50
VALIDATION_SEED = 20240
VALIDATION_CHUNK = 16


class Clips(Protocol):
    """What training needs of `training.clips.ClipGenerator`."""

    def sample(
        self,
        batch: int,
        frames: int,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, list[str]]:
        """Videos [B, 3, F, H, W] in [-1, 1] and their captions."""


@dataclass(frozen=True)
class Shape:
    """Clips of one size.

    Attributes:
        size: Frames, height and width.
        batch: Clips a step.
        weight: Share of the stage's steps, relative to its other shapes.
    """

    size: tuple[int, int, int]
    batch: int
    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """One stage: training of the whole codec, of its decoder alone, or of the denoiser.

    A denoiser stage with several shapes draws one of them for every step, so that no clip size is
    forgotten while another is learned.
    """

    spec: str
    seconds: float
    shapes: tuple[Shape, ...]
    lr_scale: float = 1.0
    trains: Literal["codec", "decoder", "denoiser"] = "denoiser"


@dataclass
class TrainConfig:
    """Options of a run; see `python -m training.train --help`."""

    output: Path
    stages: str
    max_steps: int | None = None
    resume: bool = False
    init: Path | None = None
    export: Path | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    cooldown: float = 0.25
    codec_lr: float = 2e-3
    codec_size: tuple[int, int, int] = (8, 128, 128)
    codec_batch: int = 48
    caption_drop: float = 0.1
    ema_decay: float = 0.999
    compile: bool = True
    cudnn_attention: bool = True
    seed: int = 0
    device: str = "cpu"
    heads: int = 6
    head_dim: int = 64
    layers: int = 7
    ffn_dim: int = 768
    text_dim: int = 128
    latent_noise: float = 0.02
    validation_clips: int = 64
    checkpoint_every: float = 120.0


def parse_size(text: str) -> tuple[int, int, int]:
    """Parses "FxHxW"."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"expected a clip size FRAMESxHEIGHTxWIDTH, got {text!r}; for example 16x128x128"
        )
    size = (int(parts[0]), int(parts[1]), int(parts[2]))
    PatchCodec.latent_shape(*size)
    return size


def parse_stages(text: str, config: TrainConfig) -> list[Stage]:
    """Parses comma-separated stages.

    `codec:SECONDS`, `decoder:SECONDS`, or `FxHxW:BATCH[*WEIGHT]`, of which several may be joined by
    `+`, followed by `:SECONDS[:LRSCALE]`.
    """
    stages = []
    for spec in (part.strip() for part in text.split(",")):
        try:
            stages.append(_parse_stage(spec, config))
        except ValueError as error:
            detail = f" ({error})" if str(error) else ""
            raise ValueError(
                "expected stages codec:SECONDS, decoder:SECONDS or "
                f"FxHxW:BATCH[*WEIGHT][+...]:SECONDS[:LRSCALE], got {spec!r}{detail}; for example "
                "codec:90,16x128x128:96*2+16x256x256:24:420"
            ) from None
    return stages


def _parse_stage(spec: str, config: TrainConfig) -> Stage:
    *first, last = spec.split("+")
    size, *numbers = last.split(":")
    if size in ("codec", "decoder"):
        (seconds,) = (_positive(number) for number in numbers)
        shape = Shape(config.codec_size, config.codec_batch)
        if first:
            raise ValueError
        return Stage(spec, seconds, (shape,), trains="codec" if size == "codec" else "decoder")
    batch, *timing = numbers
    if len(timing) not in (1, 2):
        raise ValueError
    seconds, *scale = (_positive(number) for number in timing)
    shapes = tuple(_parse_shape(text) for text in (*first, f"{size}:{batch}"))
    return Stage(spec, seconds, shapes, *scale)


def _parse_shape(text: str) -> Shape:
    size, batch = text.split(":")
    count, *weight = batch.split("*", 1)
    if _positive(count) != int(count):
        raise ValueError
    return Shape(parse_size(size), int(count), *(_positive(number) for number in weight))


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError
    return number


def sample_sigmas(
    batch: int, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Noise levels [B]: logit-normal, then shifted exactly as the scheduler shifts its own."""
    u = torch.randn(batch, device=device, generator=generator).sigmoid()
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def quantile_sigmas(count: int, device: torch.device) -> torch.Tensor:
    """Evenly spaced quantiles [count] of the distribution of `sample_sigmas`."""
    p = (torch.arange(count, device=device, dtype=torch.float32) + 0.5) / count
    u = torch.special.ndtri(p).sigmoid()
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def count_parameters(*modules: nn.Module) -> int:
    """Number of parameters of the modules."""
    return sum(p.numel() for module in modules for p in module.parameters())


@dataclass
class Clock:
    """Progress through a stage by wall time, or by steps where those are limited."""

    seconds: float
    max_steps: int | None
    elapsed_before: float = 0.0
    steps: int = 0
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds spent in the stage, including those before a resume."""
        return self.elapsed_before + time.monotonic() - self.start

    @property
    def fraction(self) -> float:
        """Progress in 0..1."""
        progress = self.elapsed / self.seconds
        if self.max_steps is not None:
            progress = max(progress, self.steps / self.max_steps)
        return min(1.0, progress)

    @property
    def done(self) -> bool:
        """Whether the stage is over."""
        return self.fraction >= 1.0


class Meter:
    """Throughput and share of the time spent on data, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any, Any]] = []
        self.clips = 0
        self.start = time.monotonic()

    def mark(self) -> Any:
        """A point in time on the device's clock."""
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any, data_end: Any, end: Any, clips: int) -> None:
        """Adds one step."""
        self._spans.append((begin, data_end, end))
        self.clips += clips

    def read(self) -> dict[str, float]:
        """Clips per second and data share since the last read; call it after a sync."""
        data = total = 0.0
        for begin, middle, end in self._spans:
            if self._cuda:
                data += begin.elapsed_time(middle)
                total += begin.elapsed_time(end)
            else:
                data += middle - begin
                total += end - begin
        now = time.monotonic()
        rate = self.clips / max(1e-9, now - self.start)
        self._spans, self.clips, self.start = [], 0, now
        return {"clips_per_s": rate, "data_share": data / total if total else 0.0}


class Trainer:
    """Owns the models, the optimiser and the checkpoint of a run.

    Args:
        config: Options.
        clips: Source of training clips, on `config.device`.
        words: Vocabulary of the captions.
        max_words: Longest caption.
    """

    def __init__(
        self, config: TrainConfig, clips: Clips, words: Sequence[str], max_words: int
    ) -> None:
        if config.optimizer not in ("adamw", "muon"):
            raise ValueError(
                f"expected optimizer adamw or muon, got {config.optimizer!r}; use adamw"
            )
        self.config = config
        self.clips = clips
        self.device = torch.device(config.device)
        self.plan = parse_stages(config.stages, config)
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(config.seed)
        if self.cuda:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
            # torch prefers its flash kernel; for shapes that cuDNN refuses it takes another.
            torch.backends.cuda.enable_flash_sdp(not config.cudnn_attention)
        self.codec = PatchCodec().to(self.device)
        if self.cuda:
            self.codec.to(memory_format=torch.channels_last)
        self.text_encoder = CaptionEncoder(
            words=list(words), max_words=max_words, dim=config.text_dim
        ).to(self.device)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=self.codec.config.latent_channels,
            out_channels=self.codec.config.latent_channels,
            text_dim=config.text_dim,
            freq_dim=256,
            ffn_dim=config.ffn_dim,
            num_layers=config.layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=1024,
        ).to(self.device)
        # The velocity has mean zero: start from that prediction.
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        self.codec_trained = False
        if config.init is not None:
            self._load_pipeline(config.init)
        self.ema_transformer = self._frozen_copy(self.transformer)
        self.ema_text_encoder = self._frozen_copy(self.text_encoder)

        self.step = 0
        self.warmup_from = 0
        self.stages_done = 0
        self.stage_elapsed = 0.0
        self.stage_steps = 0
        self.history: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.optimizers = self._make_optimizers()
        if config.resume:
            self.load()
        self.generator = torch.Generator(device=self.device)
        # A resumed run must not see the clips of the first steps again.
        self.generator.manual_seed(config.seed + 1_000_003 * len(self.history) + self.step)
        self._compiled = False

    # ---------------------------------------------------------------- set-up

    def _load_pipeline(self, folder: Path) -> None:
        """Starts from the weights of an exported pipeline."""
        if self.config.resume:
            raise ValueError("expected either --init or --resume, got both; drop one")
        pipe = EmojiVideoPipeline.from_pretrained(str(folder))
        words = list(self.text_encoder.config.words)
        if list(pipe.text_encoder.config.words) != words:
            raise ValueError(
                f"expected the vocabulary of the captions ({len(words)} words) in {folder}, got "
                "another one; export the model again with this code"
            )
        for name in ("transformer", "text_encoder", "codec"):
            getattr(self, name).load_state_dict(getattr(pipe, name).state_dict())
        self.codec_trained = True

    @staticmethod
    def _frozen_copy(module: nn.Module) -> nn.Module:
        return copy.deepcopy(module).eval().requires_grad_(False)

    @property
    def state_path(self) -> Path:
        """The checkpoint."""
        return self.config.output / "state.pt"

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all resumed runs."""
        return self.seconds_before + time.monotonic() - self.started

    def trainable(self) -> list[nn.Parameter]:
        """Parameters of the denoiser and the text encoder, in the order of `ema_parameters`."""
        return [*self.transformer.parameters(), *self.text_encoder.parameters()]

    def ema_parameters(self) -> list[nn.Parameter]:
        """Averaged counterparts of `trainable`."""
        return [*self.ema_transformer.parameters(), *self.ema_text_encoder.parameters()]

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        hidden: list[nn.Parameter] = []
        if config.optimizer == "muon":
            hidden = [
                p
                for blocks in (self.transformer.blocks, self.text_encoder.blocks)
                for p in blocks.parameters()
                if p.ndim == 2
            ]
        taken = {id(p) for p in hidden}
        rest = [p for p in self.trainable() if id(p) not in taken]
        # Biases and norms have no reason to shrink towards zero.
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=self.cuda)
        ]
        if hidden:
            optimizers.append(
                torch.optim.Muon(
                    hidden,
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        return optimizers

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.cuda:
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16)

    def _compile(self) -> None:
        if self._compiled or not (self.config.compile and self.cuda):
            return
        # Every clip size gets its own static kernel; a long list of stages must not fall back to
        # eager execution when it reaches the default limit.
        torch._dynamo.config.recompile_limit = 64
        self.transformer.compile_repeated_blocks(dynamic=False)
        self._compiled = True

    # ------------------------------------------------------------ checkpoint

    def save(self) -> None:
        """Writes the checkpoint; the old one stays intact until the new one is complete."""
        state = {
            "models": {
                "transformer": self.transformer.state_dict(),
                "text_encoder": self.text_encoder.state_dict(),
                "codec": self.codec.state_dict(),
                "ema_transformer": self.ema_transformer.state_dict(),
                "ema_text_encoder": self.ema_text_encoder.state_dict(),
            },
            "words": list(self.text_encoder.config.words),
            "optimizer_name": self.config.optimizer,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "warmup_from": self.warmup_from,
            "plan": [stage.spec for stage in self.plan],
            "stages_done": self.stages_done,
            "stage_elapsed": self.stage_elapsed,
            "stage_steps": self.stage_steps,
            "codec_trained": self.codec_trained,
            "history": self.history,
            "validation": self.validation,
            "seconds": self.elapsed,
        }
        self.config.output.mkdir(parents=True, exist_ok=True)
        temporary = self.state_path.with_suffix(".pt.tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)
        self._write_log()

    def _write_log(self) -> None:
        self.config.output.mkdir(parents=True, exist_ok=True)
        for name, rows in (("loss.json", self.history), ("validation.json", self.validation)):
            path = self.config.output / name
            temporary = path.with_suffix(".json.tmp")
            temporary.write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
            os.replace(temporary, path)

    def load(self) -> None:
        """Restores the checkpoint of `config.output`."""
        if not self.state_path.is_file():
            raise ValueError(
                f"expected a checkpoint {self.state_path} to resume from, got no such file; "
                "drop --resume or correct --output"
            )
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        words = list(self.text_encoder.config.words)
        if state["words"] != words:
            raise ValueError(
                f"expected the vocabulary of the checkpoint ({len(state['words'])} words), got "
                f"another one ({len(words)} words); resume with the code that wrote it"
            )
        for name, weights in state["models"].items():
            getattr(self, name).load_state_dict(weights)
        self.step = state["step"]
        self.codec_trained = state["codec_trained"]
        self.history = state["history"]
        self.validation = state["validation"]
        self.seconds_before = state["seconds"]
        if state["optimizer_name"] == self.config.optimizer:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.warmup_from = state["warmup_from"]
        else:
            tqdm.write(f"optimizer changed to {self.config.optimizer}: fresh state and warm-up")
            self.warmup_from = self.step
        unfinished = state["stages_done"] < len(state["plan"])
        if unfinished and state["plan"] == [stage.spec for stage in self.plan]:
            self.stages_done = state["stages_done"]
            self.stage_elapsed = state["stage_elapsed"]
            self.stage_steps = state["stage_steps"]

    # ------------------------------------------------------------- the stages

    def run(self) -> None:
        """Runs all stages that are left, then exports."""
        total = count_parameters(self.transformer, self.text_encoder, self.codec)
        tqdm.write(
            f"parameters: transformer {count_parameters(self.transformer):,}, text encoder "
            f"{count_parameters(self.text_encoder):,}, codec {count_parameters(self.codec):,}; "
            f"{2 * total / 1e6:.2f} MB in bf16"
        )
        for index in range(self.stages_done, len(self.plan)):
            stage = self.plan[index]
            if stage.trains != "denoiser":
                self.train_codec(stage)
            else:
                self.train_denoiser(stage, final=index == len(self.plan) - 1)
            self.stages_done = index + 1
            self.stage_elapsed, self.stage_steps = 0.0, 0
            self.save()
        if self.config.export is not None:
            self.export(self.config.export)

    def _record(
        self, bar: tqdm, stage: Stage, loss: float, meter: Meter, step: int, **extra: float
    ) -> None:
        rates = {name: round(value, 4) for name, value in meter.read().items()}
        self.history.append(
            {
                "step": step,
                "seconds": round(self.elapsed, 2),
                "stage": stage.spec,
                "loss": round(loss, 6),
                **rates,
                **extra,
            }
        )
        bar.set_postfix(loss=f"{loss:.4f}", step=step, **rates)
        self._write_log()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss} at step {step}; resume from the last checkpoint with a "
                "lower --lr"
            )

    def _clock(self, stage: Stage) -> Clock:
        return Clock(
            stage.seconds, self.config.max_steps, self.stage_elapsed, steps=self.stage_steps
        )

    @staticmethod
    def _bar(stage: Stage, clock: Clock) -> tqdm:
        return tqdm(
            total=round(stage.seconds, 1),
            initial=round(clock.elapsed, 1),
            desc=stage.spec,
            mininterval=2.0,
            bar_format="{desc} |{bar:20}| {n:.0f}/{total:.0f}s {postfix}",
        )

    def train_codec(self, stage: Stage) -> None:
        """Trains the codec by reconstruction and freezes it.

        A `codec` stage trains all of it and measures the normalisation; a `decoder` stage keeps the
        latents, on which the denoiser depends, as they are.
        """
        whole = stage.trains == "codec"
        if whole and (self.step > 0 or self.codec_trained):
            raise ValueError(
                "expected codec stages before all denoiser stages, got one for a codec that a "
                "denoiser depends on; use decoder:SECONDS, which keeps the latents"
            )
        if not whole and not self.codec_trained:
            raise ValueError(
                f"expected a trained codec before {stage.spec!r}, got none; start the stages with "
                "codec:90 or use --init"
            )
        codec = self.codec.train()
        if whole:
            codec.latent_mean.zero_()
            codec.latent_std.fill_(1.0)
        parameters = list(codec.parameters()) if whole else codec.decoder_parameters()
        codec.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.config.codec_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=self.cuda,
        )
        clock = self._clock(stage)
        clock.elapsed_before, clock.steps = 0.0, 0
        meter = Meter(self.device)
        running = torch.zeros((), device=self.device)
        since = 0
        (shape,) = stage.shapes
        bar = self._bar(stage, clock)
        while not clock.done:
            begin = meter.mark()
            video, _ = self.clips.sample(shape.batch, *shape.size, generator=self.generator)
            data_end = meter.mark()
            fraction = clock.fraction
            ramp = min(1.0, (clock.steps + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = (
                    self.config.codec_lr
                    * ramp
                    * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction)))
                )
            with self._autocast():
                latents = codec.encode_raw(video)
                # Noise proportional to the spread cannot be escaped by scaling the latents up; it
                # makes neighbouring latents decode to neighbouring clips.
                spread = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
                noise = self.config.latent_noise * spread * torch.randn_like(latents)
                decoded = codec.decode_raw(latents + noise.to(latents.dtype))
            error = decoded.float() - video
            reconstruction = error.square().mean()
            # The weak pull on the latents only fixes their scale, which reconstruction leaves free.
            loss = reconstruction + 0.05 * error.abs().mean()
            loss = loss + 1e-5 * latents.float().square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running += reconstruction.detach()
            clock.steps += 1
            since += 1
            meter.add(begin, data_end, meter.mark(), shape.batch)
            if clock.steps % LOG_EVERY == 0 or clock.done:
                value = running.item() / since
                running.zero_()
                since = 0
                psnr = round(10 * math.log10(4 / max(value, 1e-12)), 2)
                self._record(bar, stage, value, meter, clock.steps, psnr=psnr)
                bar.n = min(clock.elapsed, stage.seconds)
                bar.refresh()
        bar.close()
        codec.eval().requires_grad_(False)
        if whole:
            self._normalise_codec(shape)
        self.codec_trained = True
        psnr = self.codec_psnr(shape.size)
        self.validation.append({"stage": stage.spec, "steps": clock.steps, "psnr": psnr})
        tqdm.write(f"codec: {clock.steps} steps, PSNR {psnr:.2f} dB")

    @torch.no_grad()
    def _normalise_codec(self, shape: Shape) -> None:
        total = torch.zeros(2, self.codec.config.latent_channels, device=self.device)
        rounds = 8
        for _ in range(rounds):
            video, _ = self.clips.sample(shape.batch, *shape.size, generator=self.generator)
            with self._autocast():
                latents = self.codec.encode_raw(video)
            latents = latents.float()
            total[0] += latents.mean(dim=(0, 2, 3, 4)) / rounds
            total[1] += latents.square().mean(dim=(0, 2, 3, 4)) / rounds
        self.codec.latent_mean.copy_(total[0])
        # A floor, since a channel that died would otherwise be blown up to pure rounding noise.
        variance = (total[1] - total[0].square()).clamp_min(1e-8)
        self.codec.latent_std.copy_(variance.sqrt())

    @torch.no_grad()
    def codec_psnr(self, size: tuple[int, int, int]) -> float:
        """Reconstruction PSNR in dB over the validation clips of a size."""
        return codec_psnr(self.codec, self.clips, size, self.config.validation_clips, self.cuda)

    def _lr(self, stage: Stage, fraction: float, final: bool) -> float:
        config = self.config
        factor = min(1.0, (self.step - self.warmup_from + 1) / max(1, config.warmup))
        if final and config.cooldown > 0 and fraction > 1 - config.cooldown:
            progress = (fraction - (1 - config.cooldown)) / config.cooldown
            factor *= 1.0 - 0.95 * progress
        return config.lr * stage.lr_scale * factor

    def denoiser_loss(self, stage_video: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Rectified-flow loss of a batch: video [B, 3, F, H, W], ids [B, L]."""
        batch = stage_video.shape[0]
        with torch.no_grad(), self._autocast():
            x0 = self.codec.encode(stage_video).float()
        dropped = torch.rand(batch, 1, device=self.device) < self.config.caption_drop
        input_ids = input_ids.masked_fill(dropped, PAD_ID)
        sigma = sample_sigmas(batch, self.device)
        noise = torch.randn_like(x0)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * x0 + level * noise
        with self._autocast():
            velocity = self.transformer(
                hidden_states=noisy,
                timestep=TRAIN_TIMESTEPS * sigma,
                encoder_hidden_states=self.text_encoder(input_ids),
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - x0)

    def train_denoiser(self, stage: Stage, final: bool) -> None:
        """Trains the denoiser and the text encoder at the stage's clip sizes."""
        if not self.codec_trained:
            raise ValueError(
                f"expected a codec stage before {stage.spec!r}, got none; start the stages with "
                "codec:90 or resume a run that has one"
            )
        self.codec.eval().requires_grad_(False)
        self.transformer.train()
        self.text_encoder.train()
        self._compile()
        parameters, averaged = self.trainable(), self.ema_parameters()
        clock = self._clock(stage)
        meter = Meter(self.device)
        running = torch.zeros((), device=self.device)
        since = 0
        saved_at = time.monotonic()
        weights = [shape.weight for shape in stage.shapes]
        bar = self._bar(stage, clock)
        while not clock.done:
            # Seeded by the step, so that a resumed stage draws on.
            drawn = random.Random(self.config.seed + self.step)
            (shape,) = drawn.choices(stage.shapes, weights)
            begin = meter.mark()
            video, captions = self.clips.sample(shape.batch, *shape.size, generator=self.generator)
            ids = self.text_encoder.tokenize_batch(captions).to(self.device, non_blocking=True)
            data_end = meter.mark()
            lr = self._lr(stage, clock.fraction, final)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            loss = self.denoiser_loss(video, ids)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            # Early on a long average would mostly hold the initial weights.
            decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - decay)
            running += loss.detach()
            since += 1
            clock.steps += 1
            meter.add(begin, data_end, meter.mark(), shape.batch)
            if clock.steps % LOG_EVERY == 0 or clock.done:
                value = running.item() / since
                running.zero_()
                since = 0
                self._record(bar, stage, value, meter, self.step, lr=round(lr, 8))
                bar.n = min(clock.elapsed, stage.seconds)
                bar.refresh()
                if time.monotonic() - saved_at > self.config.checkpoint_every:
                    self.stage_elapsed, self.stage_steps = clock.elapsed, clock.steps
                    self.save()
                    saved_at = time.monotonic()
        bar.close()
        for shape in stage.shapes:
            value = self.validate(shape.size)
            size = "x".join(map(str, shape.size))
            row = {"stage": stage.spec, "size": size, "step": self.step, "loss": value}
            self.validation.append(row)
            tqdm.write(f"{size}: step {self.step}, validation loss (EMA) {value:.5f}")

    @torch.no_grad()
    def validate(self, size: tuple[int, int, int]) -> float:
        """Loss of the averaged weights on fixed clips, noise levels and noise of a size."""
        generator = torch.Generator(device=self.device).manual_seed(VALIDATION_SEED)
        count = self.config.validation_clips
        sigmas = quantile_sigmas(count, self.device)
        # Spread the levels over the chunks, which then all have the same difficulty.
        order = torch.arange(count, device=self.device) * 37 % count
        total = torch.zeros((), device=self.device)
        for first in range(0, count, VALIDATION_CHUNK):
            batch = min(VALIDATION_CHUNK, count - first)
            video, captions = self.clips.sample(batch, *size, generator=generator)
            sigma = sigmas[order[first : first + batch]]
            ids = self.ema_text_encoder.tokenize_batch(captions).to(self.device)
            with self._autocast():
                x0 = self.codec.encode(video).float()
            noise = torch.randn(x0.shape, device=self.device, generator=generator)
            level = sigma.view(-1, 1, 1, 1, 1)
            with self._autocast():
                velocity = self.ema_transformer(
                    hidden_states=(1 - level) * x0 + level * noise,
                    timestep=TRAIN_TIMESTEPS * sigma,
                    encoder_hidden_states=self.ema_text_encoder(ids),
                    return_dict=False,
                )[0]
            total += F.mse_loss(velocity.float(), noise - x0) * batch
        return total.item() / count

    def pipeline(self) -> EmojiVideoPipeline:
        """Pipeline of the averaged weights in bf16, on the CPU."""
        models = {
            "transformer": self.ema_transformer,
            "codec": self.codec,
            "text_encoder": self.ema_text_encoder,
        }
        copies = {
            name: self._frozen_copy(model).to("cpu", torch.bfloat16)
            for name, model in models.items()
        }
        return EmojiVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=TRAIN_TIMESTEPS, shift=SHIFT
            ),
            **copies,
        )

    def export(self, folder: Path) -> None:
        """Writes the averaged weights as a pipeline folder."""
        self.pipeline().save_pretrained(folder, safe_serialization=True)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        tqdm.write(f"exported {folder} ({size / 1e6:.2f} MB)")


@torch.no_grad()
def codec_psnr(
    codec: PatchCodec, clips: Clips, size: tuple[int, int, int], count: int = 64, bf16: bool = False
) -> float:
    """Mean reconstruction PSNR in dB, peak to peak, over `count` fixed clips of a size."""
    device = codec.latent_mean.device
    generator = torch.Generator(device=device).manual_seed(VALIDATION_SEED)
    total = 0.0
    for first in range(0, count, VALIDATION_CHUNK):
        batch = min(VALIDATION_CHUNK, count - first)
        video, _ = clips.sample(batch, *size, generator=generator)
        video = video.float()
        enabled = bf16 and device.type == "cuda"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            decoded = codec.decode(codec.encode(video.to(codec.dtype)))
        mse = (decoded.float().clamp(-1, 1) - video).square().mean(dim=(1, 2, 3, 4))
        total += (10 * torch.log10(4 / mse.clamp_min(1e-12))).sum().item()
    return total / count


def build_clips(atlas: Path, device: torch.device) -> Clips:
    """Clip generator of an atlas file."""
    from training.clips import ClipGenerator, SpriteAtlas

    if not Path(atlas).is_file():
        raise ValueError(
            f"expected an atlas file {atlas}, got no such file; build it first, see training/"
        )
    return ClipGenerator(SpriteAtlas.load(atlas), device)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Trains the embedded text-to-video model on generated clips.",
    )
    add = parser.add_argument
    add("--atlas", type=Path, required=True, help="sprite atlas (.npz)")
    add("--output", type=Path, required=True, help="folder of state.pt and loss.json")
    add(
        "--stages",
        default="codec:90,16x128x128:96:420",
        help="codec:SECONDS, decoder:SECONDS and FxHxW:BATCH[*WEIGHT][+...]:SECONDS[:LRSCALE], "
        "comma-separated",
    )
    add("--max-steps", type=int, default=None, help="also end each stage after so many steps")
    add("--resume", action="store_true", help="go on from OUTPUT/state.pt")
    add("--init", type=Path, default=None, help="start from an exported pipeline folder")
    add("--export", type=Path, default=None, help="write the EMA weights as a pipeline folder")
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=200, help="warm-up steps")
    add(
        "--cooldown",
        type=float,
        default=0.25,
        help="share of the final stage over which the learning rate falls to 5 %%",
    )
    add(
        "--no-cooldown",
        dest="cooldown",
        action="store_const",
        const=0.0,
        help="keep the learning rate: this run is not the last piece",
    )
    add("--codec-size", default="8x128x128", help="clip size of codec stages")
    add("--codec-batch", type=int, default=48)
    add("--codec-lr", type=float, default=2e-3)
    add("--ema-decay", type=float, default=0.999)
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the transformer blocks on CUDA",
    )
    add(
        "--cudnn-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train with cuDNN's attention, on Hopper nearly twice as fast as the default kernel",
    )
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--heads", type=int, default=6, help="attention heads of 64 channels")
    add("--layers", type=int, default=7)
    add("--ffn-dim", type=int, default=768)
    add("--validation-clips", type=int, default=64)
    add("--checkpoint-every", type=float, default=120.0, help="seconds inside a stage")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from dit_sparse.pipelines.captions import MAX_WORDS, WORDS

    options = vars(parse_arguments(arguments))
    atlas = options.pop("atlas")
    options["codec_size"] = parse_size(options["codec_size"])
    config = TrainConfig(**options)
    clips = build_clips(atlas, torch.device(config.device))
    Trainer(config, clips, list(WORDS), MAX_WORDS).run()


if __name__ == "__main__":
    main()
