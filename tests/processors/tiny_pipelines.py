"""Real pipelines around tiny transformers, called with embeddings and returning latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from installed import find
from tiny_images import AURAFLOW, CHROMA, COGVIEW, FLUX, LUMINA2, QWEN, SD3, Z_IMAGE
from tiny_models import Draw, randomize
from tiny_videos import ALLEGRO, COGVIDEOX, HUNYUAN, HUNYUAN_15, LTX, MOCHI, WAN
from torch import Tensor

FLOW = "FlowMatchEulerDiscreteScheduler"
HEUN = "FlowMatchHeunDiscreteScheduler"


@dataclass(frozen=True, eq=False)
class TinyPipeline:
    """One pipeline class around a tiny model.

    Attributes:
        pipeline: Class name in diffusers.
        model: Class name of its transformer.
        config: Of the transformer.
        prompt: Embeddings for a draw and a number of prompts.
        sizes: Two sets of arguments that decide the grid.
        scheduler: Class name and arguments.
        branches: What the passes of one step are called.
        options: Further arguments of every call.
        per_prompt: Name of the argument for several results a prompt.
        variant: Tells uses of one class apart.
        vae: Class name and arguments, for conditions that are images.
        extra: Further components.
        images: Arguments that are images, made of one random picture.
        prompts: Most prompts that the pipeline takes with these conditions.
        callback: Name of the argument for a callback after each step, if there is one.
        repeats: Whether it repeats given embeddings for several results a prompt.
    """

    pipeline: str
    model: str
    config: dict[str, Any]
    prompt: Callable[[Draw, int], dict[str, Any]]
    sizes: tuple[dict[str, Any], dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]] = (FLOW, {})
    branches: tuple[str, ...] = ("cond", "uncond")
    options: dict[str, Any] = field(default_factory=dict)
    per_prompt: str = "num_videos_per_prompt"
    variant: str = ""
    vae: tuple[str, dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    prompts: int = 2
    repeats: bool = False
    callback: str = "callback_on_step_end"

    @property
    def name(self) -> str:
        return f"{self.pipeline}-{self.variant}" if self.variant else self.pipeline

    def build(self, scheduler: tuple[str, dict[str, Any]] | None = None) -> Any:
        kind, arguments = scheduler or self.scheduler
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = find("diffusers", self.model)(**self.config).eval()
            randomize(model)
            sharpen(model)
            vae = getattr(diffusers, self.vae[0])(**self.vae[1]).eval() if self.vae else None
        pipeline = find("diffusers", self.pipeline)
        names = inspect.signature(pipeline.__init__).parameters
        components = {name: None for name in names if name != "self"}
        components |= {
            "transformer": model.requires_grad_(False),
            "scheduler": getattr(diffusers, kind)(**arguments),
            "vae": vae,
        }
        given = {name: components[name] for name in components if name in names}
        pipe = pipeline(**given | self.extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(
        self,
        pipe: Any,
        steps: int = 4,
        size: int = 0,
        seed: int = 0,
        prompts: int = 1,
        **options: Any,
    ) -> Tensor:
        """Latents of one generation."""
        draw = Draw(seed=seed)
        arguments = {**self.prompt(draw, prompts), **self.sizes[size], **self.options, **options}
        for name in self.images:
            picture = self.sizes[size]
            arguments[name] = torch.rand(
                1, 3, picture["height"], picture["width"], generator=draw.generator
            )
        return pipe(
            num_inference_steps=steps,
            generator=draw.generator,
            output_type="latent",
            return_dict=False,
            **arguments,
        )[0]


def sharpen(model: Any) -> None:
    """Makes attention concentrate, so that skipped blocks are seen in the output."""
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_added_q.weight")):
            parameter.data *= 3


def text(d: Draw, prompts: int, tokens: int, *names: str) -> dict[str, Any]:
    return {name: d.normal(prompts, tokens, 8) for name in names}


def masks(d: Draw, prompts: int, tokens: int, *names: str) -> dict[str, Any]:
    lengths = [tokens - 2 - i for i in range(prompts)]
    return {name: d.valid(*lengths, tokens=tokens) for name in names}


def plain(d: Draw, prompts: int) -> dict[str, Any]:
    return text(d, prompts, 6, "prompt_embeds", "negative_prompt_embeds")


def hunyuan(d: Draw, prompts: int) -> dict[str, Any]:
    embeds = text(d, prompts, 7, "prompt_embeds", "negative_prompt_embeds")
    for prefix in ("", "negative_"):
        embeds[f"{prefix}pooled_prompt_embeds"] = d.normal(prompts, 8)
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return embeds | masks(d, prompts, 7, *names)


def hunyuan_15(d: Draw, prompts: int) -> dict[str, Any]:
    embeds = {}
    for prefix in ("", "negative_"):
        embeds[f"{prefix}prompt_embeds"] = d.normal(prompts, 6, 8)
        embeds[f"{prefix}prompt_embeds_mask"] = d.valid(*(5, 3)[:prompts], tokens=6)
        embeds[f"{prefix}prompt_embeds_2"] = d.normal(prompts, 4, 6)
        embeds[f"{prefix}prompt_embeds_mask_2"] = d.valid(*(0, 4)[:prompts], tokens=4)
    return embeds


def masked(d: Draw, prompts: int) -> dict[str, Any]:
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return plain(d, prompts) | masks(d, prompts, 6, *names)


def mochi(d: Draw, prompts: int) -> dict[str, Any]:
    embeds = masked(d, prompts)
    return {k: v.bool() if k.endswith("mask") else v for k, v in embeds.items()}


def flux(d: Draw, prompts: int) -> dict[str, Any]:
    return text(d, prompts, 7, "prompt_embeds") | {"pooled_prompt_embeds": d.normal(prompts, 8)}


def flux_guided(d: Draw, prompts: int) -> dict[str, Any]:
    return flux(d, prompts) | {
        "negative_prompt_embeds": d.normal(prompts, 7, 8),
        "negative_pooled_prompt_embeds": d.normal(prompts, 8),
    }


def sd3(d: Draw, prompts: int) -> dict[str, Any]:
    embeds = text(d, prompts, 7, "prompt_embeds", "negative_prompt_embeds")
    for prefix in ("", "negative_"):
        embeds[f"{prefix}pooled_prompt_embeds"] = d.normal(prompts, 8)
    return embeds


def qwen(d: Draw, prompts: int) -> dict[str, Any]:
    # The unconditional text is shorter: its passes have another number of tokens.
    embeds = {
        "prompt_embeds": d.normal(prompts, 9, 8),
        "negative_prompt_embeds": d.normal(prompts, 5, 8),
    }
    return embeds | {
        "prompt_embeds_mask": d.valid(*(9 - i for i in range(prompts)), tokens=9),
        "negative_prompt_embeds_mask": d.valid(*[5] * prompts, tokens=5),
    }


def chroma(d: Draw, prompts: int) -> dict[str, Any]:
    # The pipeline makes its mask of numbers and not of truth values.
    return {key: value.float() for key, value in masked(d, prompts).items()}


def lumina2(d: Draw, prompts: int) -> dict[str, Any]:
    embeds = {
        name: d.normal(prompts, 6, 16) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    lengths = {"prompt_attention_mask": (5, 3), "negative_prompt_attention_mask": (2, 2)}
    return embeds | {
        name: d.valid(*values[:prompts], tokens=6).bool() for name, values in lengths.items()
    }


def z_image(d: Draw, prompts: int) -> dict[str, Any]:
    return {
        "prompt_embeds": [d.normal(5 + 30 * i, 16) for i in range(prompts)],
        "negative_prompt_embeds": [d.normal(3, 16) for _ in range(prompts)],
    }


def pixels(height: int, width: int, **others: Any) -> dict[str, Any]:
    return {"height": height, "width": width, **others}


WAN_VAE = {
    "base_dim": 3,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
HUNYUAN_15_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
    "downsample_match_channel": False,
    "upsample_match_channel": False,
}
LTX_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False, False, False, False, False),
    "upsample_residual": (False, False, False, False),
    "upsample_factor": (1, 1, 1, 1),
    "patch_size": 1,
    "patch_size_t": 1,
    "encoder_causal": True,
    "decoder_causal": False,
}
COGVIDEOX_VAE = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 4,
}
FLUX_VAE = {
    "block_out_channels": (4, 4, 4, 4),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 1,
    "norm_num_groups": 1,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.06,
    "scaling_factor": 1.5,
}
UNIPC = (
    "UniPCMultistepScheduler",
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
)

PIPELINES = [
    TinyPipeline(
        "WanPipeline",
        "WanTransformer3DModel",
        WAN | {"in_channels": 16, "out_channels": 16},
        plain,
        (pixels(128, 96, num_frames=13), pixels(96, 160, num_frames=9)),
        UNIPC,
        repeats=True,
    ),
    TinyPipeline(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        WAN | {"in_channels": 36, "out_channels": 16},
        plain,
        (pixels(64, 96, num_frames=13), pixels(96, 64, num_frames=9)),
        UNIPC,
        vae=("AutoencoderKLWan", WAN_VAE),
        images=("image",),
        repeats=True,
    ),
    TinyPipeline(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        hunyuan,
        (pixels(128, 96, num_frames=13), pixels(96, 160, num_frames=9)),
        branches=("cond",),
        repeats=True,
    ),
    TinyPipeline(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        hunyuan,
        (pixels(128, 96, num_frames=13), pixels(96, 160, num_frames=9)),
        options={"true_cfg_scale": 3.0},
        variant="guided",
        repeats=True,
    ),
    TinyPipeline(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        COGVIDEOX | {"use_rotary_positional_embeddings": True, "attention_head_dim": 16},
        plain,
        (pixels(96, 128, num_frames=13), pixels(128, 96, num_frames=17)),
        ("CogVideoXDDIMScheduler", {}),
        ("cond_uncond",),
    ),
    TinyPipeline(
        "CogVideoXImageToVideoPipeline",
        "CogVideoXTransformer3DModel",
        COGVIDEOX
        | {
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "attention_head_dim": 16,
        },
        plain,
        (pixels(96, 128, num_frames=13), pixels(128, 96, num_frames=17)),
        ("CogVideoXDDIMScheduler", {}),
        ("cond_uncond",),
        vae=("AutoencoderKLCogVideoX", COGVIDEOX_VAE),
        images=("image",),
        prompts=1,
    ),
    TinyPipeline(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        LTX,
        masked,
        (pixels(256, 320, num_frames=25), pixels(320, 192, num_frames=17)),
        branches=("cond_uncond",),
    ),
    TinyPipeline(
        "LTXImageToVideoPipeline",
        "LTXVideoTransformer3DModel",
        LTX,
        masked,
        (pixels(64, 96, num_frames=25), pixels(96, 64, num_frames=17)),
        branches=("cond_uncond",),
        vae=("AutoencoderKLLTXVideo", LTX_VAE),
        images=("image",),
    ),
    TinyPipeline(
        "LTXConditionPipeline",
        "LTXVideoTransformer3DModel",
        LTX,
        masked,
        (pixels(64, 96, num_frames=25), pixels(96, 64, num_frames=17)),
        branches=("cond_uncond",),
        vae=("AutoencoderKLLTXVideo", LTX_VAE),
        # A picture in the middle of the video: its tokens are put in front.
        options={"frame_index": 8},
        images=("image",),
        prompts=1,
    ),
    TinyPipeline(
        "MochiPipeline",
        "MochiTransformer3DModel",
        MOCHI | {"in_channels": 12},
        mochi,
        (pixels(128, 96, num_frames=19), pixels(96, 160, num_frames=13)),
        (FLOW, {"invert_sigmas": True}),
        ("cond_uncond",),
    ),
    TinyPipeline(
        "AllegroPipeline",
        "AllegroTransformer3DModel",
        ALLEGRO,
        masked,
        (pixels(128, 96, num_frames=16), pixels(96, 160, num_frames=12)),
        ("DDIMScheduler", {}),
        ("call",),
        options={"negative_prompt": None},
    ),
    TinyPipeline(
        "FluxPipeline",
        "FluxTransformer2DModel",
        FLUX,
        flux,
        (pixels(256, 192), pixels(160, 256)),
        branches=("cond",),
        per_prompt="num_images_per_prompt",
        repeats=True,
    ),
    TinyPipeline(
        "FluxPipeline",
        "FluxTransformer2DModel",
        FLUX,
        flux_guided,
        (pixels(256, 192), pixels(160, 256)),
        options={"true_cfg_scale": 3.0},
        per_prompt="num_images_per_prompt",
        variant="guided",
        repeats=True,
    ),
    TinyPipeline(
        "FluxKontextPipeline",
        "FluxTransformer2DModel",
        FLUX,
        flux,
        (pixels(256, 192), pixels(160, 256)),
        branches=("call",),
        options={"_auto_resize": False, "max_area": 256 * 192},
        per_prompt="num_images_per_prompt",
        vae=("AutoencoderKL", FLUX_VAE),
        images=("image",),
        repeats=True,
    ),
    TinyPipeline(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        sd3,
        (pixels(256, 192), pixels(160, 256)),
        branches=("call",),
        per_prompt="num_images_per_prompt",
    ),
    TinyPipeline(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        QWEN,
        qwen,
        (pixels(256, 192), pixels(160, 256)),
        per_prompt="num_images_per_prompt",
        repeats=True,
    ),
    TinyPipeline(
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "out_channels": 8,
            "use_additional_conditions": False,
        },
        masked,
        (pixels(256, 192), pixels(160, 256)),
        ("DPMSolverMultistepScheduler", {}),
        ("call",),
        options={"use_resolution_binning": False, "negative_prompt": None},
        callback="callback",
        per_prompt="num_images_per_prompt",
        repeats=True,
    ),
    TinyPipeline(
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2Transformer3DModel",
        WAN | {"in_channels": 16, "out_channels": 16},
        plain,
        (pixels(128, 96, num_frames=13), pixels(96, 160, num_frames=9)),
        UNIPC,
        options={"prompt": None},
        repeats=True,
    ),
    TinyPipeline(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        CHROMA,
        chroma,
        (pixels(256, 192), pixels(160, 256)),
        branches=("call", "call#1"),
        per_prompt="num_images_per_prompt",
    ),
    TinyPipeline(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        LUMINA2,
        lumina2,
        (pixels(256, 192), pixels(160, 256)),
        branches=("call", "call#1"),
        options={"negative_prompt": None},
        per_prompt="num_images_per_prompt",
    ),
    TinyPipeline(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        z_image,
        (pixels(256, 192), pixels(160, 256)),
        branches=("call",),
        per_prompt="num_images_per_prompt",
    ),
    TinyPipeline(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        AURAFLOW,
        masked,
        (pixels(256, 192), pixels(160, 256)),
        branches=("call",),
        per_prompt="num_images_per_prompt",
    ),
    TinyPipeline(
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        COGVIEW,
        plain,
        (pixels(256, 192), pixels(160, 256)),
        per_prompt="num_images_per_prompt",
    ),
    TinyPipeline(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_15 | {"in_channels": 9},
        hunyuan_15,
        (pixels(32, 24, num_frames=7), pixels(24, 40, num_frames=5)),
        branches=("pred_cond", "pred_uncond"),
        vae=("AutoencoderKLHunyuanVideo15", HUNYUAN_15_VAE),
        extra={"guider": ClassifierFreeGuidance(guidance_scale=3.0)},
        callback="",
    ),
]
