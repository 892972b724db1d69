"""A tiny text-to-video pipeline: two layers of two heads, 512 tokens at its test size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_emoji import tiny_pipeline


@pytest.fixture
def tiny_pipe() -> Any:
    pipe = tiny_pipeline(sharpness=6)
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
