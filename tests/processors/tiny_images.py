"""Tiny configurations of the image transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from tiny_models import Draw, Grid, Tiny, without

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 8),
}


def flux(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, grid[1] * grid[2], 4),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "pooled_projections": d.normal(batch, 8),
        "timestep": d.full(0.5, batch),
        "img_ids": Draw().ids(grid),
        "txt_ids": d.full(0.0, 7, 3),
    }


def flux_kontext(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    # A reference of the same size: only its first id tells it from the image.
    ids = torch.cat([Draw().ids(grid), Draw().ids(grid, first=1)])
    states = d.normal(batch, len(ids), 4)
    return flux(d, grid, batch) | {"hidden_states": states, "img_ids": ids}


CHROMA = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (4, 4, 8),
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}


def chroma(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    inputs = flux(d, grid, batch)
    del inputs["pooled_projections"]
    return inputs


def chroma_masked(d: Draw, grid: Grid, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    image = grid[1] * grid[2]
    text = d.valid(*(5, 3)[:batch], tokens=7)
    mask = torch.cat([text, d.valid(*(image,) * batch, tokens=image)], 1)
    return chroma(d, grid, batch) | {"attention_mask": mask.to(dtype)}


def longcat(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    inputs = chroma(d, grid, batch)
    # Rows and columns are counted on from the text.
    ids = Draw().ids(grid)
    ids[:, 1:] += 7
    return inputs | {"img_ids": ids}


def bria_fibo(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    layers = [d.normal(batch, 7, 6) for _ in range(3)]
    inputs = flux(d, grid, batch) | {"text_encoder_layers": layers}
    del inputs["pooled_projections"]
    return inputs


FLUX2 = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}


def flux2(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, grid[1] * grid[2], 4),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "timestep": d.full(0.5, batch),
        "guidance": d.full(4.0, batch),
        "img_ids": Draw().ids(grid, columns=4).expand(batch, -1, -1),
        "txt_ids": torch.zeros(batch, 7, 4),
    }


def flux2_references(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    ids = torch.cat([Draw().ids(grid, columns=4), Draw().ids((1, 2, 3), columns=4, first=10)])
    inputs = flux2(d, grid, batch) | {"hidden_states": d.normal(batch, len(ids), 4)}
    return inputs | {"img_ids": ids.expand(batch, -1, -1)}


def flux3(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    inputs = flux2(d, grid, batch)
    del inputs["guidance"]
    return inputs | {
        "img_ids": Draw().ids(grid, columns=4, scale=0.5),
        "txt_ids": torch.zeros(7, 4),
        "image_cond_hidden_states": d.normal(batch, 6, 4),
        "image_cond_ids": Draw().ids((1, 2, 3), columns=4),
    }


def krea2(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, grid[1] * grid[2], 4),
        "encoder_hidden_states": d.normal(batch, 7, 2, 8),
        "timestep": d.full(0.5, batch),
        "position_ids": torch.cat([torch.zeros(7, 3), Draw().ids(grid)]),
        "encoder_attention_mask": d.valid(*(5, 3)[:batch], tokens=7).bool(),
    }


IMAGE_POSITIONS = 65536


def ideogram4(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    image, text = grid[1] * grid[2], 6
    positions = torch.zeros(batch, text + image, 3, dtype=torch.long)
    segments = torch.ones(batch, text + image, dtype=torch.long)
    indicator = torch.full((batch, text + image), 2)
    for row, length in enumerate((6, 4)[:batch]):
        positions[row, text - length : text] = torch.arange(length)[:, None]
        segments[row, : text - length] = -1
        indicator[row, : text - length] = 0
        indicator[row, text - length : text] = 3
    positions[:, text:] = Draw().ids(grid).long() + IMAGE_POSITIONS
    return {
        "hidden_states": d.normal(batch, text + image, 4),
        "encoder_hidden_states": d.normal(batch, text + image, 8),
        "timestep": d.full(0.5, batch),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }


SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}


def sd3(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "pooled_projections": d.normal(batch, 8),
        "timestep": d.full(500.0, batch),
    }


QWEN = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 1,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (8, 4, 4),
}


QWEN_TAKES_LENGTHS = (
    "txt_seq_lens" in inspect.signature(QwenImageTransformer2DModel.forward).parameters
)


def qwen(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, grid[1] * grid[2], 4),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "encoder_hidden_states_mask": d.valid(*(5, 7)[:batch], tokens=7).bool(),
        "timestep": d.full(0.5, batch),
        "img_shapes": [[grid]] * batch,
        # Newer versions read it from the prompt.
        **({"txt_seq_lens": [7] * batch} if QWEN_TAKES_LENGTHS else {}),
    }


def qwen_edit(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    image = grid[1] * grid[2]
    inputs = qwen(d, grid, batch) | {"hidden_states": d.normal(batch, image + 6, 4)}
    return inputs | {"img_shapes": [[grid, (1, 2, 3)]] * batch, "encoder_hidden_states_mask": None}


def qwen_layered(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    layers, h, w = grid
    inputs = qwen(d, grid, batch) | {"hidden_states": d.normal(batch, layers * h * w + 6, 4)}
    shapes = [*[(1, h, w)] * layers, (1, 2, 3)]
    extra = {"additional_t_cond": torch.zeros(batch, dtype=torch.long)}
    return inputs | {"img_shapes": [shapes] * batch} | extra


def pixart(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "encoder_attention_mask": d.valid(*(5, 3)[:batch], tokens=5),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def dit(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "timestep": d.full(500.0, batch),
        "class_labels": torch.arange(batch),
    }


def hunyuan_dit(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    image = grid[1] * grid[2]
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 4, 8),
        "text_embedding_mask": d.valid(*(4, 3)[:batch], tokens=4),
        "encoder_hidden_states_t5": d.normal(batch, 4, 8),
        "text_embedding_mask_t5": d.valid(*(4, 2)[:batch], tokens=4),
        "image_meta_size": d.full(16.0, batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (d.normal(image, 8), d.normal(image, 8)),
    }


AURAFLOW = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "num_mmdit_layers": 1,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 8,
    "out_channels": 4,
    "pos_embed_max_size": 256,
}


def auraflow(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "timestep": d.full(0.5, batch),
    }


LUMINA = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "norm_eps": 1e-5,
}


def lumina_next(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": d.normal(batch, 5, 16),
        "timestep": d.full(0.5, batch),
        "encoder_mask": d.valid(*(5, 3)[:batch], tokens=5),
        "image_rotary_emb": torch.polar(torch.ones(64, 64, 4), Draw().normal(64, 64, 4)),
        "cross_attention_kwargs": {},
    }


LUMINA2 = LUMINA | {
    "multiple_of": 2,
    "num_refiner_layers": 1,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (64, 64, 64),
    "cap_feat_dim": 16,
}


def lumina2(d: Draw, grid: Grid, batch: int, lengths: tuple[int, ...] = (5, 3)) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": d.normal(batch, 7, 16),
        "timestep": d.full(0.5, batch),
        # The model reads the lengths itself, so the mask has values on every device.
        "encoder_attention_mask": Draw().valid(*lengths[:batch], tokens=7).bool(),
    }


Z_IMAGE = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "cap_feat_dim": 16,
    "axes_dims": [8, 4, 4],
    "axes_lens": [128, 64, 64],
}


def z_image(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "x": [d.normal(16, f, 2 * h, 2 * w) for _ in range(batch)],
        "cap_feats": [d.normal(length, 16) for length in (5, 40)[:batch]],
        "t": d.full(0.5, batch),
    }


def up32(n: int) -> int:
    return -(-n // 32) * 32


HIDREAM = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_channels": [8, 4],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (256, 256),
    "llama_layers": (0, 1),
    "force_inference_output": True,
}


def hidream(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "timesteps": d.full(500.0, batch),
        "encoder_hidden_states_t5": d.normal(batch, 5, 8),
        "encoder_hidden_states_llama3": d.normal(2, batch, 3, 4),
        "pooled_embeds": d.normal(batch, 8),
    }


def hidream_tokens(largest: int) -> Any:
    def beside(grid: Grid, batch: int) -> tuple[int, int]:
        # Other shapes than squares are padded to the largest.
        image = grid[1] * grid[2]
        return 0, 5 + 3 + 3 + (0 if grid[1] == grid[2] else largest - image)

    return beside


COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 4,
    "num_attention_heads": 4,
    "out_channels": 4,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def cogview(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "timestep": d.full(500.0, batch),
        "original_size": d.full(64.0, batch, 2),
        "target_size": d.full(64.0, batch, 2),
        "crop_coords": d.full(0.0, batch, 2),
    }


def cogview_masked(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return cogview(d, grid, batch) | {"attention_mask": d.valid(*(5, 3)[:batch], tokens=7)}


GLM = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "text_embed_dim": 8,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": 64,
}


def glm(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    image = grid[1] * grid[2]
    inputs = cogview(d, grid, batch)
    del inputs["original_size"]
    return inputs | {
        "prior_token_id": torch.arange(batch * image).view(batch, image) % 64,
        "prior_token_drop": torch.zeros(batch, image, dtype=torch.bool),
    }


def ernie(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, grid[1], grid[2]),
        "timestep": d.full(500.0, batch),
        "text_bth": d.normal(batch, 7, 8),
        "text_lens": torch.tensor((5, 3)[:batch]),
    }


JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 8,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}


def joy(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, 4, f, 2 * h, 2 * w),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "timestep": d.full(500.0, batch),
    }


def joy_items(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return joy(d, grid, batch) | {"hidden_states": d.normal(batch, 3, 4, f, 2 * h, 2 * w)}


def joy_plus(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    # The references differ, so one sample has three padding patches.
    shapes = [[grid, (1, 2, 3)], [grid, (1, 1, 3)]][:batch]
    return {
        "hidden_states": d.normal(batch, f * h * w + 6, 4, 1, 2, 2),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "encoder_hidden_states_mask": d.valid(*(5, 3)[:batch], tokens=5),
        "timestep": d.full(500.0, batch),
        "shape_list": shapes,
    }


def prx(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "timestep": d.full(0.5, batch),
        "attention_mask": d.valid(*(5, 3)[:batch], tokens=5).bool(),
    }


NUCLEUS = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 1,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (8, 4, 4),
    "moe_enabled": False,
    "capacity_factors": [8.0, 8.0],
}


def nucleus(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, grid[1] * grid[2], 4),
        "img_shapes": [grid] * batch,
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "timestep": d.full(0.5, batch),
    }


def hunyuan_image(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, grid[1], grid[2]),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 6, 8),
        "encoder_attention_mask": d.valid(*(4, 6)[:batch], tokens=6),
        "encoder_hidden_states_2": d.normal(batch, 4, 6),
        "encoder_attention_mask_2": d.valid(*(3, 0)[:batch], tokens=4),
        "guidance": d.full(4.0, batch),
    }


FIBO2 = {
    "in_channels": 4,
    "patch_size": 2,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 8,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 2,
    "max_num_gist_tokens": 8,
    "gist_step": 2,
    "gist_min_text_len": 2,
    "gist_max_text_len": 10,
    "axes_dims": (4, 6, 6),
    "axes_lens": (64, 64, 64),
}


def fibo2(d: Draw, grid: Grid, batch: int, lengths: tuple[int, ...] = (6, 6)) -> dict[str, Any]:
    return {
        "hidden_states": d.normal(batch, 4, 2 * grid[1], 2 * grid[2]),
        "timestep": d.full(0.5, batch),
        "encoder_hidden_states": d.normal(batch, 2, 10, 8),
        # The model reads the lengths itself, so the mask has values on every device.
        "encoder_attention_mask": Draw().valid(*lengths[:batch], tokens=10).bool(),
        "context_latents": [d.normal(batch, 4, 4, 6)],
    }


def fibo2_ragged(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return fibo2(d, grid, batch, lengths=(6, 9))


PACKED = ("hidden_states", "packed")
BCHW = ("hidden_states", "BCHW")


def image(model: str, config: dict[str, Any], inputs: Any, *args: Any, **fields: Any) -> Tiny:
    fields = {"grid": (1, 3, 5), "latents": BCHW} | fields
    return Tiny(model, config, inputs, *args, **fields)


IMAGES = [
    image("FluxTransformer2DModel", FLUX, flux, (7, 0), latents=PACKED, sites=3),
    image(
        "FluxTransformer2DModel",
        FLUX,
        flux_kontext,
        lambda grid, batch: (7, grid[1] * grid[2]),
        variant="kontext",
        latents=PACKED,
        sites=3,
    ),
    image("ChromaTransformer2DModel", CHROMA, chroma, (7, 0), latents=PACKED, sites=3),
    image(
        "ChromaTransformer2DModel",
        CHROMA,
        lambda d, grid, batch: chroma_masked(d, grid, batch, torch.float32),
        (7, 0),
        variant="weights",
        latents=PACKED,
        sites=3,
    ),
    image(
        "ChromaTransformer2DModel",
        CHROMA,
        lambda d, grid, batch: chroma_masked(d, grid, batch, torch.bool),
        (7, 0),
        variant="mask",
        latents=PACKED,
        sites=3,
        masked=True,
    ),
    image(
        "BriaTransformer2DModel",
        FLUX,
        flux,
        (7, 0),
        latents=PACKED,
        sites=3,
    ),
    image(
        "BriaFiboTransformer2DModel",
        without(FLUX, "pooled_projection_dim")
        | {"text_encoder_dim": 6, "num_layers": 1, "num_single_layers": 2},
        bria_fibo,
        (7, 0),
        latents=PACKED,
        sites=3,
    ),
    image("LongCatImageTransformer2DModel", FLUX, longcat, (7, 0), latents=PACKED, sites=3),
    image(
        "OvisImageTransformer2DModel",
        without(FLUX, "pooled_projection_dim"),
        chroma,
        (7, 0),
        latents=PACKED,
        sites=3,
    ),
    image("Flux2Transformer2DModel", FLUX2, flux2, (7, 0), latents=PACKED, sites=3),
    image(
        "Flux2Transformer2DModel",
        FLUX2,
        flux2_references,
        (7, 6),
        variant="references",
        latents=PACKED,
        sites=3,
    ),
    image(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        flux3,
        (7, 6),
        latents=PACKED,
        sites=3,
        untouched=("txt_mode_blocks", "image_cond"),
    ),
    image(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
            "rope_theta": 1000.0,
            "norm_eps": 1e-5,
        },
        krea2,
        (7, 0),
        latents=PACKED,
        masked=True,
        untouched=("text_fusion",),
    ),
    image(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 8,
            "rope_theta": 10000,
            "mrope_section": (2, 1, 1),
        },
        ideogram4,
        (6, 0),
        latents=PACKED,
        packed_at=6,
        masked=True,
        used=(6, None),
    ),
    image("SD3Transformer2DModel", SD3, sd3, (0, 7)),
    image(
        "SD3Transformer2DModel",
        SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        sd3,
        (0, 7),
        variant="3.5",
        sites=3,
    ),
    image("QwenImageTransformer2DModel", QWEN, qwen, (7, 0), latents=PACKED, masked=True),
    image("QwenImageTransformer2DModel", QWEN, qwen_edit, (7, 6), variant="edit", latents=PACKED),
    image(
        "QwenImageTransformer2DModel",
        QWEN | {"use_layer3d_rope": True, "use_additional_t_cond": True},
        qwen_layered,
        (7, 6),
        variant="layered",
        latents=PACKED,
        grid=(3, 2, 4),
        masked=True,
    ),
    image(
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
        pixart,
        untouched=("attn2",),
    ),
    image(
        "DiTTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 8,
        },
        dit,
        grid=(1, 4, 4),
    ),
    image(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
        },
        hunyuan_dit,
        grid=(1, 4, 4),
        untouched=("attn2",),
    ),
    image(
        "AuraFlowTransformer2DModel",
        AURAFLOW,
        auraflow,
        (8 + 7, 0),
        sites=3,
    ),
    image(
        "LuminaNextDiT2DModel",
        LUMINA | {"multiple_of": 16, "cross_attention_dim": 16, "learn_sigma": False},
        lumina_next,
        untouched=("attn2",),
    ),
    image(
        "Lumina2Transformer2DModel",
        LUMINA2,
        lumina2,
        lambda grid, batch: (5, 0) if batch == 1 else (0, 5),
        mixes=True,
        masked=True,
        untouched=("noise_refiner", "context_refiner"),
    ),
    image(
        "ZImageTransformer2DModel",
        Z_IMAGE,
        z_image,
        lambda grid, batch: (
            0,
            up32(grid[1] * grid[2]) - grid[1] * grid[2] + (32 if batch == 1 else 64),
        ),
        latents=("x", "list"),
        mixes=True,
        masked=True,
        untouched=("noise_refiner", "context_refiner"),
    ),
    image(
        "HiDreamImageTransformer2DModel",
        HIDREAM,
        hidream,
        hidream_tokens(128 * 128),
        grid=(1, 4, 4),
    ),
    image(
        "HiDreamImageTransformer2DModel",
        HIDREAM | {"max_resolution": (12, 12)},
        hidream,
        hidream_tokens(36),
        variant="padded",
        largest=36,
    ),
    image(
        "CogView3PlusTransformer2DModel",
        COGVIEW | {"pos_embed_max_size": 8, "sample_size": 8},
        cogview,
        (7, 0),
    ),
    image("CogView4Transformer2DModel", COGVIEW, cogview, (7, 0)),
    image("CogView4Transformer2DModel", COGVIEW, cogview_masked, (7, 0), variant="weights"),
    image("GlmImageTransformer2DModel", GLM, glm, (7, 0)),
    image(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 1,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 8,
            "rope_axes_dim": (8, 4, 4),
        },
        ernie,
        (0, 7),
        patch=(1, 1, 1),
        masked=True,
    ),
    image(
        "JoyImageEditTransformer3DModel",
        JOY,
        joy,
        (0, 5),
        latents=("hidden_states", "BCFHW"),
        grid=(2, 2, 3),
    ),
    image(
        "JoyImageEditTransformer3DModel",
        JOY,
        joy_items,
        lambda grid, batch: (0, 5 + 2 * grid[0] * grid[1] * grid[2]),
        variant="items",
        latents=("hidden_states", "BNCFHW"),
    ),
    image(
        "JoyImageEditPlusTransformer3DModel",
        JOY,
        joy_plus,
        (0, 6 + 5),
        latents=PACKED,
        masked=True,
        used=(0, 15),
    ),
    image(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
            "theta": 10000,
        },
        prx,
        (5, 0),
        masked=True,
    ),
    image("NucleusMoEImageTransformer2DModel", NUCLEUS, nucleus, (0, 7), latents=PACKED),
    image(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "guidance_embeds": True,
            "text_embed_dim": 8,
            "text_embed_2_dim": 6,
            "rope_axes_dim": (4, 4),
        },
        hunyuan_image,
        (0, 10),
        patch=(1, 1, 1),
        masked=True,
        untouched=("token_refiner",),
    ),
    image(
        "BriaFibo2Transformer2DModel",
        FIBO2,
        fibo2,
        (6, 6),
        mixes=True,
        untouched=("noise_refiner", "perceiver"),
    ),
    image(
        "BriaFibo2Transformer2DModel",
        FIBO2,
        fibo2_ragged,
        lambda grid, batch: (6, 6) if batch == 1 else (0, 6 + 8),
        variant="ragged",
        mixes=True,
        masked=True,
    ),
]
