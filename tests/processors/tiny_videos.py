"""Tiny configurations of the video transformers."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import Draw, Grid, Tiny, without

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def wan(d: Draw, grid: Grid, batch: int, channels: int = 4, text: int = 5) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, channels, f, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, text, 8),
    }


def wan_image(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    # The processor takes everything but the last 512 tokens for image tokens.
    image = {"encoder_hidden_states_image": d.normal(batch, 3, 8)}
    return wan(d, grid, batch, text=512) | image


def wan_per_token(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    timestep = d.full(500.0, batch, f * h * w)
    return wan(d, grid, batch) | {"timestep": timestep}


def wan_vace(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    control = d.normal(batch, 6, f, 2 * h, 2 * w)
    return wan(d, grid, batch) | {"control_hidden_states": control}


def wan_animate(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return wan(d, grid, batch, channels=12) | {
        "encoder_hidden_states_image": d.normal(batch, 3, 8),
        "pose_hidden_states": d.normal(batch, 4, f - 1, 2 * h, 2 * w),
        "face_pixel_values": d.normal(batch, 3, 4 * (f - 2) + 1, 16, 16),
    }


def anyflow(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, f, 4, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch, f),
        "r_timestep": d.full(250.0, batch, f),
        "encoder_hidden_states": d.normal(batch, 5, 8),
    }


def helios(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    inputs = wan(d, grid, batch)
    _, h, w = grid
    inputs["indices_hidden_states"] = torch.arange(grid[0]).expand(batch, -1)
    for name, frames in (("short", 1), ("mid", 3), ("long", 5)):
        inputs[f"indices_latents_history_{name}"] = torch.arange(frames).expand(batch, -1)
        inputs[f"latents_history_{name}"] = d.normal(batch, 4, frames, 2 * h, 2 * w)
    return inputs


def up(n: int, step: int) -> int:
    return -(-n // step)


def helios_history(grid: Grid, batch: int) -> tuple[int, int]:
    _, h, w = grid
    # One frame of the same size, 3 frames at half and 5 at a quarter of the resolution, rounded up.
    return h * w + 2 * up(h, 2) * up(w, 2) + 2 * up(h, 4) * up(w, 4), 0


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
    "image_condition_type": None,
}


def hunyuan(d: Draw, grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, channels, f, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 7, 8),
        "encoder_attention_mask": d.valid(*(5, 3)[:batch], tokens=7),
        "pooled_projections": d.normal(batch, 8),
        "guidance": d.full(6000.0, batch),
    }


def hunyuan_pairs(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return hunyuan(d, (2 * grid[0], *grid[1:]), batch)


HUNYUAN_15 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 8,
    "text_embed_2_dim": 6,
    "image_embed_dim": 8,
    "rope_axes_dim": (2, 2, 4),
    "target_size": 16,
    "task_type": "t2v",
}


def hunyuan_15(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, 4, f, h, w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 6, 8),
        "encoder_attention_mask": d.valid(*(4, 6)[:batch], tokens=6),
        "encoder_hidden_states_2": d.normal(batch, 4, 6),
        "encoder_attention_mask_2": d.valid(*(3, 0)[:batch], tokens=4),
        "image_embeds": d.full(0.0, batch, 3, 8),
    }


def hunyuan_15_image(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return hunyuan_15(d, grid, batch) | {"image_embeds": d.normal(batch, 3, 8)}


def framepack(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    inputs = hunyuan(d, grid, batch) | {
        "image_embeds": d.normal(batch, 2, 8),
        "indices_latents": torch.arange(f),
    }
    # The mask decides the length of a single video, so it has values on every device.
    inputs["encoder_attention_mask"] = Draw().valid(*(5, 3)[:batch], tokens=7)
    for name, frames in (("clean", 2), ("history_2x", 3), ("history_4x", 5)):
        inputs[f"latents_{name}"] = d.normal(batch, 4, frames, 2 * h, 2 * w)
        inputs[f"indices_latents_{name}"] = torch.arange(frames)
    return inputs


def framepack_tokens(grid: Grid, batch: int) -> tuple[int, int]:
    _, h, w = grid
    history = 2 * h * w + 2 * up(h, 2) * up(w, 2) + 2 * up(h, 4) * up(w, 4)
    return history, 2 + (5 if batch == 1 else 7)


MOTIF = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 3,
    "num_decoder_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "norm_type": "layer_norm",
    "text_embed_dim": 8,
    "image_embed_dim": 4,
    "rope_axes_dim": (4, 4, 4),
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}


def motif(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, 5, f, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 6, 8),
        "encoder_attention_mask": d.valid(*(5, 3)[:batch], tokens=6),
        "image_embeds": d.normal(batch, 2, 4),
    }


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 6,
    "sample_frames": 5,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 6,
}


def cogvideox(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, f, 4, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 6, 8),
    }


def rotary(d: Draw, tokens: int, dim: int) -> tuple[Any, Any]:
    angles = d.normal(tokens, dim)
    return angles.cos(), angles.sin()


def cogvideox_rotary(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return cogvideox(d, grid, batch) | {"image_rotary_emb": rotary(d, f * h * w, 8)}


def cogvideox_15(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    inputs = cogvideox(d, (2 * f, h, w), batch)
    return inputs | {"image_rotary_emb": rotary(d, f * h * w, 8), "ofs": d.full(2.0, batch)}


def consisid(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    vit = [d.full(1.0, batch, 2, 2)]
    return cogvideox(d, grid, batch) | {"id_vit_hidden": vit, "id_cond": d.full(1.0, batch, 2)}


LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 8,
}


def ltx(d: Draw, grid: Grid, batch: int, extra: int = 0) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, extra + f * h * w, 4),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "encoder_attention_mask": d.valid(*(5, 3)[:batch], tokens=5).bool(),
        "num_frames": f,
        "height": h,
        "width": w,
    }


def ltx_condition(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    # A clean frame from the middle of the video is put in front of it, with its own coordinates.
    inputs = ltx(d, grid, batch, extra=h * w)
    frame, video = Draw().ids((1, h, w), first=f), Draw().ids(grid)
    coords = torch.cat([frame, video]).T * torch.tensor([[8.0], [32.0], [32.0]])
    inputs["video_coords"] = coords.expand(batch, -1, -1)
    return inputs | {"num_frames": None, "height": None, "width": None}


LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 8,
    "rope_double_precision": False,
}


def ltx2(d: Draw, grid: Grid, batch: int, extra: int = 0) -> dict[str, Any]:
    return ltx(d, grid, batch, extra) | {
        "audio_hidden_states": d.normal(batch, 9, 4),
        "audio_encoder_hidden_states": d.normal(batch, 5, 8),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def spans(grid: Grid, first: float) -> Any:
    """Begin and end of every token, ``[tokens, 3, 2]``; the first frame is shorter."""
    begin = Draw().ids(grid)
    begin[:, 0] = (begin[:, 0] * 8 - 7).clamp(min=0)
    end = Draw().ids(grid) + 1
    end[:, 0] = end[:, 0] * 8 - 7
    both = torch.stack([begin, end], -1)
    both[:, 0] += first
    return both


def ltx2_keyframe(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    inputs = ltx2(d, grid, batch, extra=h * w)
    # A keyframe at the last picture begins before the video ends.
    keyframe = spans((1, h, w), first=8 * f - 8)
    coords = torch.cat([spans(grid, 0), keyframe]).transpose(0, 1)
    return inputs | {"video_coords": coords.expand(batch, *coords.shape)}


def ltx2_coords_only(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    sizes = {"num_frames": None, "height": None, "width": None}
    return ltx2_keyframe(d, grid, batch) | sizes


MOCHI = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "qk_norm": "rms_norm",
    "text_embed_dim": 8,
    "time_embed_dim": 4,
    "activation_fn": "swiglu",
    "max_sequence_length": 6,
}


def mochi(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, 4, f, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 6, 8),
        "encoder_attention_mask": d.valid(*(4, 6)[:batch], tokens=6).bool(),
    }


ALLEGRO = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "caption_channels": 8,
}


def allegro(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, 4, f, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "encoder_attention_mask": d.valid(*(5, 3)[:batch], tokens=5),
    }


COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": "learnable",
}


def cosmos(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return wan(d, grid, batch) | {"fps": 30}


def cosmos_per_frame(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    return cosmos(d, grid, batch) | {"timestep": d.full(0.5, batch, 1, grid[0], 1, 1)}


KANDINSKY5 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 6,
    "time_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}


def kandinsky5(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, f, 2 * h, 2 * w, 4),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "timestep": d.full(500.0, batch),
        "pooled_projections": d.normal(batch, 6),
        "visual_rope_pos": [torch.arange(n) for n in grid],
        "text_rope_pos": torch.arange(5),
    }


KANDINSKY6 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 6,
    "time_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
    "visual_cond": False,
    "in_audio_dim": 3,
    "out_audio_dim": 3,
}


def kandinsky6(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, f, 2 * h, 2 * w, 4),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "pooled_projections": d.normal(batch, 6),
        "timestep": d.full(500.0, batch),
        "audio_hidden_states": d.normal(batch, 6, 3),
    }


EASYANIMATE = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "mmdit_layers": 1,
    "num_layers": 2,
    "patch_size": 2,
    "sample_height": 12,
    "sample_width": 16,
    "text_embed_dim": 8,
    "text_embed_dim_t5": 6,
    "time_embed_dim": 8,
    "time_position_encoding_type": "3d_rope",
    "timestep_activation_fn": "silu",
}


def easyanimate(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    f, h, w = grid
    return {
        "hidden_states": d.normal(batch, 4, f, 2 * h, 2 * w),
        "timestep": d.full(500.0, batch),
        "encoder_hidden_states": d.normal(batch, 5, 8),
        "encoder_hidden_states_t5": d.normal(batch, 3, 6),
    }


MINIMAX_H3 = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "hidden_size": 24,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": 4,
    "audio_in_channels": 6,
    "patch_size": (1, 2, 2),
    "text_dim": 8,
    "freq_dim": 8,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 2,
}


def minimax_h3(d: Draw, grid: Grid, batch: int) -> dict[str, Any]:
    video, text, audio = grid[0] * grid[1] * grid[2], 4, 6
    total = text + audio + video
    positions = torch.zeros(total, 3)
    positions[:text, 0] = torch.arange(text)
    positions[text : text + audio, 0] = torch.arange(audio)
    positions[text + audio :] = Draw().ids(grid, first=text)
    tags = torch.tensor([0] * text + [2] * audio + [1] * video)
    return {
        "hidden_states": d.normal(batch, video, 16),
        "audio_hidden_states": d.normal(batch, audio, 6),
        "encoder_hidden_states": d.normal(batch, text, 8),
        "timestep": torch.tensor([0.5, 0.4]),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": torch.arange(text + audio, total),
        "audio_indices": torch.arange(text, text + audio),
        "text_indices": torch.arange(text),
    }


BFCHW = ("hidden_states", "BFCHW")
BFHWC = ("hidden_states", "BFHWC")
PACKED = ("hidden_states", "packed")

VIDEOS = [
    Tiny("WanTransformer3DModel", WAN, wan, untouched=("attn2",)),
    Tiny("WanTransformer3DModel", WAN, wan_per_token, variant="per-token"),
    Tiny(
        "WanTransformer3DModel",
        WAN | {"image_dim": 8, "added_kv_proj_dim": 24},
        wan_image,
        variant="image",
        untouched=("attn2",),
    ),
    Tiny(
        "WanVACETransformer3DModel",
        WAN | {"num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 6},
        wan_vace,
        sites=5,
        latents=("control_hidden_states", "BCFHW"),
    ),
    Tiny(
        "WanAnimateTransformer3DModel",
        WAN
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        wan_animate,
        grid=(3, 3, 4),
        frames_from=2,
        untouched=("attn2", "face_adapter"),
    ),
    Tiny("ChronoEditTransformer3DModel", WAN | {"rope_temporal_skip_len": 8}, wan),
    Tiny("SkyReelsV2Transformer3DModel", WAN, wan),
    Tiny("AnyFlowTransformer3DModel", without(WAN, "qk_norm"), anyflow, latents=BFCHW),
    Tiny(
        "HeliosTransformer3DModel",
        without(WAN, "rope_max_seq_len")
        | {
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": False,
        },
        helios,
        helios_history,
    ),
    Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        hunyuan,
        (0, 7),
        masked=True,
        untouched=("token_refiner",),
    ),
    Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | {"image_condition_type": "token_replace", "patch_size_t": 2},
        hunyuan_pairs,
        (0, 7),
        variant="token-replace",
        patch=(2, 2, 2),
        masked=True,
    ),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_15,
        hunyuan_15,
        (0, 13),
        patch=(1, 1, 1),
        masked=True,
        untouched=("token_refiner",),
    ),
    Tiny(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_15,
        hunyuan_15_image,
        (0, 13),
        variant="image",
        patch=(1, 1, 1),
        masked=True,
    ),
    Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        framepack,
        framepack_tokens,
        masked=True,
        untouched=("token_refiner",),
    ),
    Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        framepack,
        framepack_tokens,
        variant="single",
        batch=1,
    ),
    Tiny(
        "MotifVideoTransformer3DModel",
        MOTIF,
        motif,
        (0, 8),
        sites=4,
        masked=True,
        untouched=("cross_attn",),
    ),
    Tiny("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox, (6, 0), latents=BFCHW),
    Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX | {"use_rotary_positional_embeddings": True},
        cogvideox_rotary,
        (6, 0),
        variant="rotary",
        latents=BFCHW,
    ),
    Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX
        | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "ofs_embed_dim": 2},
        cogvideox_15,
        (6, 0),
        variant="1.5",
        latents=BFCHW,
        patch=(2, 2, 2),
    ),
    Tiny(
        "ConsisIDTransformer3DModel",
        COGVIDEOX
        | {
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        consisid,
        (6, 0),
        latents=BFCHW,
    ),
    Tiny("LTXVideoTransformer3DModel", LTX, ltx, latents=PACKED, patch=(1, 1, 1)),
    Tiny(
        "LTXVideoTransformer3DModel",
        LTX,
        ltx_condition,
        lambda grid, batch: (grid[1] * grid[2], 0),
        variant="condition",
        latents=PACKED,
        packed_at=12,
    ),
    Tiny("LTX2VideoTransformer3DModel", LTX2, ltx2, latents=PACKED, untouched=("audio",)),
    Tiny(
        "LTX2VideoTransformer3DModel",
        LTX2 | {"perturbed_attn": True},
        ltx2_keyframe,
        lambda grid, batch: (0, grid[1] * grid[2]),
        variant="keyframe",
        latents=PACKED,
    ),
    Tiny(
        "LTX2VideoTransformer3DModel",
        LTX2,
        ltx2_coords_only,
        lambda grid, batch: (0, grid[1] * grid[2]),
        variant="coordinates",
        latents=PACKED,
        frames_from=2,
    ),
    Tiny("MochiTransformer3DModel", MOCHI, mochi, (0, 6), masked=True),
    Tiny("AllegroTransformer3DModel", ALLEGRO, allegro),
    Tiny("CosmosTransformer3DModel", COSMOS, cosmos),
    Tiny("CosmosTransformer3DModel", COSMOS, cosmos_per_frame, variant="per-frame"),
    Tiny("Kandinsky5Transformer3DModel", KANDINSKY5, kandinsky5, latents=BFHWC),
    Tiny("Kandinsky6Transformer3DModel", KANDINSKY6, kandinsky6, latents=BFHWC),
    Tiny("EasyAnimateTransformer3DModel", EASYANIMATE, easyanimate, (8, 0)),
    Tiny("MiniMaxH3Transformer3DModel", MINIMAX_H3, minimax_h3, (10, 0), latents=PACKED),
]
