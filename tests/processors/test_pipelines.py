"""Real Wan pipelines with tiny components: text-, image- and video-to-video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from torch import Tensor

from dit_sparse import enable_sparse_attention
from dit_sparse.methods.base import Call

STEPS = 5
SETTINGS = {"sparsity": 0.5, "search": (2, 4)}
PHASES = ["dense", "search", "sparse", "refresh", "sparse"]
Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def runner(pipe: Any, text: int = 8, **fixed: Any) -> tuple[Any, Run]:
    pipe.set_progress_bar_config(disable=True)

    def run(**options: Any) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        embeds = torch.randn(2, 1, text, 32, generator=rng)
        arguments = {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "height": 64,
            "width": 128,
            "num_inference_steps": STEPS,
            "generator": rng,
            "output_type": "latent",
        }
        return pipe(**{**arguments, **fixed, **options}).frames

    return pipe, run


def t2v(wan: Any, vae: Any) -> Any:
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler()}
    return runner(WanPipeline(**parts, transformer=wan()), num_frames=13, output_type="pt")


def t2v_22(wan: Any, vae: Any) -> Any:
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler(),
        transformer=wan(),
        transformer_2=wan(seed=1),
        boundary_ratio=0.7,
    )
    return runner(pipe, num_frames=13)


def ti2v_text(wan: Any, vae: Any) -> Any:
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler()}
    pipe = WanPipeline(**parts, transformer=wan(), expand_timesteps=True)
    return runner(pipe, num_frames=13)


def image_to_video(vae: Any, text: int = 8, **parts: Any) -> Any:
    pipe = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), **parts
    )
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, 64, 128, generator=rng)
    return runner(pipe, text, image=image, num_frames=13)


def i2v_21(wan: Any, vae: Any) -> Any:
    transformer = wan(in_channels=36, image_dim=16, added_kv_proj_dim=24)
    pipe, run = image_to_video(vae, text=512, transformer=transformer)
    # In place of the CLIP image encoder.
    embeds = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2))
    pipe.encode_image = lambda image, device: embeds
    return pipe, run


def i2v_22(wan: Any, vae: Any) -> Any:
    experts = wan(in_channels=36), wan(seed=1, in_channels=36)
    return image_to_video(vae, transformer=experts[0], transformer_2=experts[1], boundary_ratio=0.7)


def ti2v_image(wan: Any, vae: Any) -> Any:
    return image_to_video(vae, transformer=wan(), expand_timesteps=True)


def v2v(wan: Any, vae: Any) -> Any:
    pipe = WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(), transformer=wan()
    )
    rng = torch.Generator().manual_seed(3)
    return runner(pipe, latents=torch.randn(1, 16, 4, 8, 16, generator=rng), strength=0.8)


@pytest.mark.parametrize(
    "build", [t2v, t2v_22, ti2v_text, i2v_21, i2v_22, ti2v_image, v2v], ids=lambda f: f.__name__
)
def test_pipeline(build: Any, wan: Any, vae: Any, calls: list[Call]) -> None:
    pipe, run = build(wan, vae)
    upstream = run()
    with enable_sparse_attention(pipe, "dense", strict=True) as dense:
        assert torch.equal(run(), upstream)
        steps = 4 if build is v2v else STEPS
        assert dense.report().dense_steps == steps
        # Two layers, two guidance branches.
        assert dense.report().kernels == {"own": 4 * steps}
    with enable_sparse_attention(pipe, "adaspa", strict=True, **SETTINGS) as sparse:
        first = run()
        assert not torch.equal(first, upstream) and first.isfinite().all()
        made = [call for call in calls if call.layer == 0]
        # Two branches a step, in turn.
        indices = [call.step.index for call in made[::2]]
        assert indices == [call.step.index for call in made[1::2]]
        # Video-to-video at strength 0.8 skips the first of five steps and starts with the search.
        assert indices == list(range(STEPS))[-len(indices) :]
        assert len(indices) == steps
        phases = [call.phase.value for call in made[::2]]
        if len(sparse.bindings) == 2:
            switch = len(sparse.bindings[0].run.dense_steps | sparse.bindings[0].run.sparse_steps)
            assert 0 < switch < STEPS
            # The second expert has no mask of its own yet.
            expected = [*PHASES[:switch], "search", *PHASES[switch + 1 :]]
        else:
            expected = PHASES[-steps:]
        assert phases == expected
        assert all(call.layout.grid == (4, 4, 8) for call in calls)
        assert torch.equal(run(), first)
    assert torch.equal(run(), upstream)
