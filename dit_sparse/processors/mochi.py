"""Mochi, with an attention processor of our own.

Upstream's processor attends once for each batch element, over its video and its valid text. The
one here makes one call with a padding mask. Dense steps cut the padding off, element by element, so
they compute what upstream computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid
from dit_sparse.processors.rewrap import sparse_sdpa


class Mochi(Family):
    """``attn1`` of every block sees [video, text].

    Mirrors ``MochiTransformer3DModel.forward`` of diffusers 0.42.1. Timesteps rise from 0 to 1000.
    """

    models = ("MochiTransformer3DModel",)
    tokens = "video, text"
    always_trims = True

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn1"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch = model.config.patch_size
        grid = patched_grid(arguments["hidden_states"].shape, (1, patch, patch))
        return TokenLayout.around(grid, after=arguments["encoder_hidden_states"].shape[1])

    def noise_level(self, timestep: Tensor) -> Tensor:
        return 1000 - timestep

    def explicit_call(self, processor: type) -> Callable[..., Any] | None:
        return attend if processor.__name__ == "MochiAttnProcessor2_0" else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``[batch, tokens, heads, dim]``, pairs interleaved, in fp32."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    first = (even * cos - odd * sin).to(x.dtype)
    second = (even * sin + odd * cos).to(x.dtype)
    return torch.stack([first, second], dim=-1).flatten(-2)


def attend(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Stands in for ``MochiAttnProcessor2_0.__call__`` of diffusers 0.42.1.

    Args:
        self: The processor.
        attn: The attention module.
        hidden_states: Video ``[batch, video, channels]``.
        encoder_hidden_states: Text ``[batch, text, channels]``.
        attention_mask: Valid text ``[batch, text]``.
        image_rotary_emb: Cosines and sines of the video tokens.
    """

    def project(states: Tensor, linear: Any, norm: Any = None) -> Tensor:
        heads = linear(states).unflatten(2, (attn.heads, -1))
        return heads if norm is None else norm(heads)

    query = project(hidden_states, attn.to_q, attn.norm_q)
    key = project(hidden_states, attn.to_k, attn.norm_k)
    value = project(hidden_states, attn.to_v)
    if image_rotary_emb is not None:
        query, key = rotate(query, *image_rotary_emb), rotate(key, *image_rotary_emb)
    text_query = project(encoder_hidden_states, attn.add_q_proj, attn.norm_added_q)
    text_key = project(encoder_hidden_states, attn.add_k_proj, attn.norm_added_k)
    text_value = project(encoder_hidden_states, attn.add_v_proj)
    video, text = query.shape[1], text_query.shape[1]
    query, key, value = (
        torch.cat(pair, 1).transpose(1, 2)
        for pair in ((query, text_query), (key, text_key), (value, text_value))
    )
    mask = functional.pad(attention_mask.bool(), (video, 0), value=True)[:, None, None]
    out = sparse_sdpa(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2, 3)
    video_out, text_out = out.split([video, text], dim=1)
    video_out = attn.to_out[1](attn.to_out[0](video_out))
    return video_out, attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out
