"""A tiny text-to-video pipeline: two layers of two heads, 512 tokens at its test size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline


@pytest.fixture
def tiny_pipe() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    from dit_sparse.pipelines.codec import PatchCodec
    from dit_sparse.pipelines.text_encoder import CaptionEncoder

    torch.manual_seed(0)
    pipe = EmojiVideoPipeline(
        transformer=WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=48,
            out_channels=48,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            qk_norm="rms_norm_across_heads",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        codec=PatchCodec(mid_channels=8, hidden_channels=16, refine_channels=4),
        text_encoder=CaptionEncoder(
            words=["a", "heart", "star"], max_words=6, dim=16, num_heads=2, ffn_dim=16
        ),
    )
    for module in (pipe.transformer, pipe.codec, pipe.text_encoder):
        module.eval()
    # Random weights attend to everything alike; sharper, so that patterns differ.
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data *= 6
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def arguments() -> dict[str, Any]:
    """Of a generation with a grid of (8, 8, 8) tokens."""
    return {
        "prompt": "a heart",
        "num_inference_steps": 3,
        "num_frames": 16,
        "height": 64,
        "width": 64,
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(0),
    }
