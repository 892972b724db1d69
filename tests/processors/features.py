"""What users switch on beside sparse attention, one entry a feature.

``test_features.py`` goes through all of them in both orders, and the table of docs/composition.md
is written from them: ``python tests/processors/composition.py > docs/composition.md``.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers.hooks
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection
from peft import LoraConfig, get_peft_model_state_dict
from tiny_images import SD3
from tiny_pipelines import PIPELINES, TinyPipeline
from tiny_videos import HUNYUAN

CPU = torch.device("cpu")
_by_name = {tiny.name: tiny for tiny in PIPELINES}
FAMILIES: dict[str, TinyPipeline] = {
    "Wan": _by_name["WanPipeline"],
    # Caches of single blocks need more than one.
    "HunyuanVideo": replace(_by_name["HunyuanVideoPipeline"], config=HUNYUAN | {"num_layers": 2}),
    "CogVideoX": _by_name["CogVideoXPipeline"],
    "LTX-Video": _by_name["LTXPipeline"],
    "FLUX.1": _by_name["FluxPipeline"],
    "Qwen-Image": _by_name["QwenImagePipeline"],
    "SD 3": replace(_by_name["StableDiffusion3Pipeline"], config=SD3),
}
STEPS = 4
# Every timestep is in it, of any scheduler.
ALWAYS = (-1, 2000)


@dataclass(frozen=True, eq=False)
class Feature:
    """Something that diffusers, or a library around it, does to a pipeline.

    Attributes:
        name: Its row.
        call: What users write.
        switch_on: Does it to a pipeline.
        changes: Whether outputs change by more than rounding.
        absent: Families for which upstream has not got it, with the reason.
        notes: Remarks by family, ``"*"`` for all.
        options: Arguments of the pipeline call, by family.
        needs: What has to be there: a package, or a class of ``diffusers.hooks``.
        keeps: Whether sparse attention that was on before stays on.
    """

    name: str
    call: str
    switch_on: Callable[[Any], None]
    changes: bool = False
    absent: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    needs: str = ""
    keeps: bool = True

    def run(self, family: str, pipe: Any, **options: Any) -> torch.Tensor:
        """Latents of one generation of ``family``."""
        given = self.options.get(family, {})
        return FAMILIES[family].run(pipe, steps=STEPS, **given, **options)


def cached(kind: str, **arguments: Any) -> Callable[[Any], None]:
    """Enables a step cache of diffusers, whose class versions before it do not have."""

    def switch_on(pipe: Any) -> None:
        config = getattr(diffusers.hooks, kind)(**arguments)
        if hasattr(config, "current_timestep_callback"):
            config.current_timestep_callback = lambda: pipe.current_timestep
        pipe.transformer.enable_cache(config)

    return switch_on


def faster_cache(pipe: Any) -> None:
    # Of all pipelines here only that of CogVideoX is what it was made for: both passes in a batch.
    batched = {
        "spatial_attention_timestep_skip_range": ALWAYS,
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": ALWAYS,
        "tensor_format": "BFCHW",
    }
    # The first step must compute.
    single = {"spatial_attention_timestep_skip_range": (-1, 950), "is_guidance_distilled": True}
    is_batched = type(pipe).__name__ == "CogVideoXPipeline"
    switch_on = cached(
        "FasterCacheConfig",
        attention_weight_callback=lambda module: 0.3,
        **(batched if is_batched else single),
    )
    switch_on(pipe)


def cache_dit(pipe: Any) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=10.0,
        max_continuous_cached_steps=1,
    )
    cache_dit.enable_cache(pipe, cache_config=config)


def load_lora(pipe: Any) -> None:
    twin = type(pipe.transformer).from_config(pipe.transformer.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        twin.add_adapter(config)
    weights = get_peft_model_state_dict(twin)
    pipe.load_lora_weights({f"transformer.{key}": value for key, value in weights.items()})


def fuse_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora()


def unload_lora(pipe: Any) -> None:
    fuse_lora(pipe)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


def load_image_prompt(pipe: Any) -> None:
    config = pipe.transformer.config
    inner = config.num_attention_heads * config.attention_head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if "StableDiffusion3" in type(pipe).__name__:
            weights = sd3_image_prompt(inner, config.attention_head_dim)
            encoder = {"image_encoder_folder": None}
        else:
            weights = flux_image_prompt(inner, config.joint_attention_dim)
            encoder = {"image_encoder_pretrained_model_name_or_path": None}
    projection, layer = weights
    layers = {f"{i}.{key}": value for i in range(config.num_layers) for key, value in layer.items()}
    state = {"image_proj": projection, "ip_adapter": layers}
    pipe.load_ip_adapter(state, weight_name="", subfolder="", **encoder)
    pipe.set_ip_adapter_scale(0.7)


def sd3_image_prompt(inner: int, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    projection = IPAdapterTimeImageProjection(
        6, inner, 64, heads=1, num_queries=2, timestep_in_dim=8
    )
    layer = SD3IPAdapterJointAttnProcessor2_0(inner, inner, head_dim, 64)
    return projection.state_dict(), layer.state_dict()


def flux_image_prompt(inner: int, text: int) -> tuple[dict[str, Any], dict[str, Any]]:
    projection = ImageProjection(6, text, num_image_text_embeds=4).state_dict()
    layer = torch.nn.ModuleDict({f"to_{name}_ip": torch.nn.Linear(text, inner) for name in "kv"})
    return {
        key.replace("image_embeds", "proj"): value for key, value in projection.items()
    }, layer.state_dict()


def unload_image_prompt(pipe: Any) -> None:
    load_image_prompt(pipe)
    pipe.unload_ip_adapter()


def unfuse_projections(pipe: Any) -> None:
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()


def quantize(pipe: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def group_offload(kind: str) -> Callable[[Any], None]:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe: pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks
    )


def sequential_offload(pipe: Any) -> None:
    from accelerate import cpu_offload

    # What enable_sequential_cpu_offload calls, which refuses to start without an accelerator.
    cpu_offload(pipe.transformer, CPU)


def whole_model(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")


def deep_copy(pipe: Any) -> None:
    pipe.transformer = copy.deepcopy(pipe.transformer)


def save_and_load(pipe: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipe.transformer.save_pretrained(folder)
        pipe.transformer = type(pipe.transformer).from_pretrained(folder)


def smooth_energy(pipe: Any) -> None:
    from diffusers.hooks import smoothed_energy_guidance_utils as seg

    # What the guider calls around its perturbed pass.
    config = seg.SmoothedEnergyGuidanceConfig(indices=[0])
    seg._apply_smoothed_energy_guidance_hook(pipe.transformer, config, 1.0)


def skip_layer(**what: bool) -> Callable[[Any], None]:
    # What the guiders call around their perturbed pass.
    return lambda pipe: apply_layer_skip(pipe.transformer, LayerSkipConfig(indices=[0], **what))


NO_CACHES = {"SD 3": "the model has no `enable_cache`"}
NO_FLAG = "upstream's hook reads `is_cross_attention`, which this attention class does not have"
UNREGISTERED = "upstream's registry does not know the attention processor"
NO_REPEATED = "the model names no repeated blocks"
SINGLE = "with guidance off, see below"
DISTILLED = "with `is_guidance_distilled=True`"
GUIDANCE_OFF = {"Wan": {"guidance_scale": 1.0}, "Qwen-Image": {"true_cfg_scale": 1.0}}
IMAGE_PROMPT = {
    "FLUX.1": {
        name: [torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(3))]
        for name in ("ip_adapter_image_embeds", "negative_ip_adapter_image_embeds")
    },
    "SD 3": {
        "ip_adapter_image_embeds": torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3))
    },
}
NO_IMAGE_PROMPTS = {
    family: "the pipeline takes no image prompts"
    for family in FAMILIES
    if family not in IMAGE_PROMPT
}
FEATURES: dict[str, list[Feature]] = {
    "Step caches": [
        Feature(
            "first block cache",
            "transformer.enable_cache(FirstBlockCacheConfig(...))",
            cached("FirstBlockCacheConfig", threshold=0.9),
            changes=True,
            absent=NO_CACHES,
        ),
        Feature(
            "MagCache",
            "transformer.enable_cache(MagCacheConfig(...))",
            cached(
                "MagCacheConfig",
                threshold=10.0,
                max_skip_steps=1,
                num_inference_steps=STEPS,
                mag_ratios=[1.0] * STEPS,
            ),
            changes=True,
            absent=NO_CACHES,
            needs="MagCacheConfig",
        ),
        Feature(
            "TaylorSeer",
            "transformer.enable_cache(TaylorSeerCacheConfig(...))",
            cached(
                "TaylorSeerCacheConfig",
                cache_interval=2,
                disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32,
                cache_identifiers=[r".*blocks\.\d+\.attn1?"],
            ),
            changes=True,
            absent=NO_CACHES,
            notes=dict.fromkeys(
                ("Wan", "CogVideoX", "LTX-Video"), "with `cache_identifiers`, see below"
            ),
            needs="TaylorSeerCacheConfig",
        ),
        Feature(
            "TaylorSeer, lite",
            "transformer.enable_cache(TaylorSeerCacheConfig(use_lite_mode=True))",
            cached(
                "TaylorSeerCacheConfig",
                cache_interval=2,
                disable_cache_before_step=2,
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            ),
            changes=True,
            absent=NO_CACHES,
            needs="TaylorSeerCacheConfig",
        ),
        Feature(
            "pyramid attention broadcast",
            "transformer.enable_cache(PyramidAttentionBroadcastConfig(...))",
            cached(
                "PyramidAttentionBroadcastConfig",
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=ALWAYS,
            ),
            changes=True,
            absent=NO_CACHES,
            notes={"Wan": SINGLE, "Qwen-Image": SINGLE},
            options=GUIDANCE_OFF,
        ),
        Feature(
            "FasterCache",
            "transformer.enable_cache(FasterCacheConfig(...))",
            faster_cache,
            changes=True,
            absent=NO_CACHES,
            notes=dict.fromkeys(("HunyuanVideo", "LTX-Video", "FLUX.1"), DISTILLED)
            | dict.fromkeys(("Wan", "Qwen-Image"), f"{DISTILLED} and guidance off, see below"),
            options=GUIDANCE_OFF,
        ),
        Feature(
            "SeaCache",
            "transformer.enable_cache(SeaCacheConfig(...))",
            cached("SeaCacheConfig", threshold=10.0),
            changes=True,
            absent=NO_CACHES
            | dict.fromkeys(
                ("HunyuanVideo", "CogVideoX", "LTX-Video", "FLUX.1", "Qwen-Image"),
                "the pipeline does not tell it the steps, so it never skips one",
            ),
            needs="SeaCacheConfig",
        ),
        Feature(
            "cache-dit",
            "cache_dit.enable_cache(pipe, cache_config=DBCacheConfig(...))",
            cache_dit,
            changes=True,
            needs="cache_dit",
        ),
    ],
    "Adapters": [
        Feature("LoRA", "pipe.load_lora_weights(...)", load_lora, changes=True),
        Feature("LoRA, fused", "pipe.fuse_lora()", fuse_lora, changes=True),
        Feature(
            "LoRA, fused, unfused and unloaded",
            "pipe.unfuse_lora(); pipe.unload_lora_weights()",
            unload_lora,
        ),
        Feature(
            "image prompts (IP-Adapter)",
            "pipe.load_ip_adapter(...)",
            load_image_prompt,
            changes=True,
            absent=NO_IMAGE_PROMPTS,
            options=IMAGE_PROMPT,
        ),
        Feature(
            "image prompts, unloaded",
            "pipe.unload_ip_adapter()",
            unload_image_prompt,
            absent=NO_IMAGE_PROMPTS,
        ),
    ],
    "Guidance": [
        Feature(
            "skipped layers (SLG)",
            "SkipLayerGuidance(...)",
            skip_layer(),
            changes=True,
            absent=dict.fromkeys(
                ("FLUX.1", "Qwen-Image", "SD 3"), "upstream mixes up text and image when it skips"
            ),
        ),
        Feature(
            "perturbed attention (PAG)",
            "PerturbedAttentionGuidance(...)",
            skip_layer(skip_attention=False, skip_attention_scores=True, skip_ff=False),
            changes=True,
            absent=dict.fromkeys(("Wan", "HunyuanVideo", "CogVideoX", "SD 3"), UNREGISTERED)
            | dict.fromkeys(("LTX-Video", "FLUX.1"), NO_FLAG),
        ),
        Feature(
            "smoothed energy (SEG)",
            "SmoothedEnergyGuidance(...)",
            smooth_energy,
            changes=True,
            absent=dict.fromkeys(("LTX-Video", "FLUX.1"), NO_FLAG),
        ),
    ],
    "Weights and kernels": [
        Feature(
            "fused projections",
            "transformer.fuse_qkv_projections()",
            lambda pipe: pipe.transformer.fuse_qkv_projections(),
        ),
        Feature(
            "fused projections, unfused",
            "transformer.unfuse_qkv_projections()",
            unfuse_projections,
        ),
        Feature(
            "attention backends",
            "transformer.set_attention_backend(...)",
            lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
            notes=dict.fromkeys(("CogVideoX", "SD 3"), "the model has one backend only"),
        ),
        Feature(
            "layerwise casting to fp8",
            "transformer.enable_layerwise_casting(...)",
            lambda pipe: pipe.transformer.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
            ),
            changes=True,
        ),
        Feature(
            "quantised linear layers (torchao)",
            "quantize_(transformer, Int8WeightOnlyConfig())",
            quantize,
            changes=True,
            needs="torchao",
        ),
    ],
    "Memory": [
        Feature(
            "group offload of blocks",
            'transformer.enable_group_offload(offload_type="block_level", ...)',
            group_offload("block_level"),
        ),
        Feature(
            "group offload of leaves",
            'transformer.enable_group_offload(offload_type="leaf_level", ...)',
            group_offload("leaf_level"),
        ),
        Feature(
            "model offload",
            "pipe.enable_model_cpu_offload()",
            lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        ),
        Feature("sequential offload", "pipe.enable_sequential_cpu_offload()", sequential_offload),
    ],
    "Compilation": [
        Feature(
            "compiled blocks",
            "transformer.compile_repeated_blocks(fullgraph=True)",
            lambda pipe: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager"),
            absent={"CogVideoX": NO_REPEATED, "SD 3": NO_REPEATED},
        ),
        Feature(
            "compiled model",
            "pipe.transformer = torch.compile(transformer, fullgraph=True)",
            whole_model,
        ),
    ],
    "Copies": [
        Feature("deep copy", "copy.deepcopy(transformer)", deep_copy),
        Feature(
            "saved and loaded",
            "transformer.save_pretrained(...); from_pretrained(...)",
            save_and_load,
            notes={"*": "the files hold weights alone: put sparse attention on what was loaded"},
            keeps=False,
        ),
    ],
}


def all_features() -> list[Feature]:
    return [feature for features in FEATURES.values() for feature in features]
