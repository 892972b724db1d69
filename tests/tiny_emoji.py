"""A tiny text-to-video pipeline that stands in for the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from dit_sparse.pipelines.codec import PatchCodec
from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline
from dit_sparse.pipelines.text_encoder import CaptionEncoder


def tiny_pipeline(words: Sequence[str] = ("a", "heart", "star"), sharpness: float = 1.0) -> Any:
    """Two layers of two heads with random weights, always the same ones.

    Args:
        words: The vocabulary.
        sharpness: Factor on the queries. Random weights attend to everything alike; sharper ones
            have patterns.
    """
    torch.manual_seed(0)
    pipeline = EmojiVideoPipeline(
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
            words=list(words), max_words=6, dim=16, num_heads=2, ffn_dim=16
        ),
    )
    for module in (pipeline.transformer, pipeline.codec, pipeline.text_encoder):
        module.eval()
    for block in pipeline.transformer.blocks:
        block.attn1.norm_q.weight.data *= sharpness
    return pipeline
