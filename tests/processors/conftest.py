"""Tiny Wan models with random weights, their inputs and real pipelines around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from installed import CacheContext, set_cache_context
from torch import Tensor

from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call

# That of diffusers' own fast tests.
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def wan() -> Callable[..., WanTransformer3DModel]:
    """Builds a transformer whose attention is sharp enough for masks to matter."""

    def build(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
        torch.manual_seed(seed)
        model = WanTransformer3DModel(**{**TINY, **changes}).eval()
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(4)
        return model

    return build


@pytest.fixture
def inputs() -> Callable[..., dict[str, Any]]:
    """Arguments of one forward pass: 256 video tokens, four blocks of 64."""

    def build(
        t: float = 500.0,
        batch: int = 1,
        frames: int = 4,
        size: tuple[int, int] = (16, 16),
        channels: int = 16,
        text: int = 8,
        seed: int = 0,
    ) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(seed)
        return {
            "hidden_states": torch.randn(batch, channels, frames, *size, generator=rng),
            "timestep": torch.full((batch,), t),
            "encoder_hidden_states": torch.randn(batch, text, 32, generator=rng),
            "return_dict": False,
        }

    return build


class Clip:
    """Calls a pipeline with fixed embeddings and noise; returns latents."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(
        self, steps: int = 5, size: int = 128, batch: int = 1, seed: int = 0, **options: Any
    ) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        embeds = torch.randn(2, batch, 8, 32, generator=rng)
        return self.pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            height=size,
            width=size,
            num_frames=13,
            num_inference_steps=steps,
            generator=rng,
            output_type="latent",
            **options,
        ).frames


@pytest.fixture
def clip(wan: Any) -> Callable[..., Clip]:
    """Builds a text-to-video pipeline; ``second`` adds the low-noise expert of Wan 2.2."""

    def build(second: Any = None, scheduler: Any = None, **options: Any) -> Clip:
        pipe = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=wan(),
            transformer_2=second,
            scheduler=scheduler
            or UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            **options,
        )
        pipe.set_progress_bar_config(disable=True)
        return Clip(pipe)

    return build


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every call that AdaSpa computes from here on, with its phase."""
    seen: list[Call] = []
    attend = AdaSpa.attend

    def spy(self: AdaSpa, call: Call) -> Tensor:
        out = attend(self, call)
        seen.append(call)
        return out

    monkeypatch.setattr(AdaSpa, "attend", spy)
    return seen


@pytest.fixture(params=["fields", "named", "string", "none"])
def context(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How much a pipeline tells: as WanPipeline, WanImageToVideo, before diffusers 0.41, or V2V."""

    @contextmanager
    def string(self: Any, name: str, **fields: Any) -> Any:
        set_cache_context(self, name)
        yield
        set_cache_context(self, None)

    @contextmanager
    def named(self: Any, name: str, **fields: Any) -> Any:
        set_cache_context(self, CacheContext(name))
        yield
        set_cache_context(self, None)

    def none(self: Any, name: str, **fields: Any) -> Any:
        return nullcontext()

    if request.param in ("fields", "named") and CacheContext is None:
        pytest.skip("this diffusers passes names alone through cache_context")
    replacement = {"string": string, "named": named, "none": none}.get(request.param)
    if replacement is not None:
        monkeypatch.setattr(WanTransformer3DModel, "cache_context", replacement)
    return request.param


@pytest.fixture
def phases(calls: list[Call]) -> Callable[..., dict[str, list[str]]]:
    """The phases so far of one layer by branch, in order."""

    def of_layer(layer: int = 0) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for call in calls:
            if call.layer == layer:
                found.setdefault(call.step.branch, []).append(call.phase.value)
        return found

    return of_layer
