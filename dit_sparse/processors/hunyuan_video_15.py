"""HunyuanVideo 1.5, with an attention processor of our own.

Upstream's processor turns its padding mask into a square one, twice, in every layer: 24 GiB at
720p and 121 frames. The one here passes the padding of the keys on. Rows of padded text then hold
other numbers than upstream's, which nothing reads; the video is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.family import Arguments, Family, attention_modules, patched_grid
from dit_sparse.processors.rewrap import sparse_dispatch


class HunyuanVideo15(Family):
    """Blocks see [video, text]: image, glyph and prompt tokens, the valid ones first.

    Mirrors ``HunyuanVideo15Transformer3DModel.forward`` of diffusers 0.42.1.
    """

    models = ("HunyuanVideo15Transformer3DModel",)
    tokens = "video, text"

    def sites(self, model: Any) -> list[tuple[str, Any]]:
        return attention_modules(model, {"transformer_blocks": "attn"})

    def layout(self, model: Any, arguments: Arguments) -> TokenLayout:
        patch, config = model.config.patch_size, model.config
        grid = patched_grid(arguments["hidden_states"].shape, (config.patch_size_t, patch, patch))
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return TokenLayout.around(grid, after=sum(arguments[name].shape[1] for name in names))

    def explicit_call(self, processor: type) -> Callable[..., Any] | None:
        return attend if processor.__name__ == "HunyuanVideo15AttnProcessor2_0" else None


def attend(
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stands in for ``HunyuanVideo15AttnProcessor2_0.__call__`` of diffusers 0.42.1.

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
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
    text = 0
    if encoder_hidden_states is not None:
        text = encoder_hidden_states.shape[1]
        text_query = project(encoder_hidden_states, attn.add_q_proj, attn.norm_added_q)
        text_key = project(encoder_hidden_states, attn.add_k_proj, attn.norm_added_k)
        text_value = project(encoder_hidden_states, attn.add_v_proj)
        query = torch.cat([query, text_query], 1)
        key = torch.cat([key, text_key], 1)
        value = torch.cat([value, text_value], 1)
    mask = None
    if attention_mask is not None:
        video = query.shape[1] - attention_mask.shape[1]
        mask = functional.pad(attention_mask, (video, 0), value=True).bool()[:, None, None]
    out = sparse_dispatch(query, key, value, attn_mask=mask).flatten(2, 3).to(query.dtype)
    video_out, text_out = out.split([query.shape[1] - text, text], dim=1)
    if encoder_hidden_states is None:
        return video_out, None
    video_out = attn.to_out[1](attn.to_out[0](video_out))
    return video_out, attn.to_add_out(text_out) if attn.to_add_out is not None else text_out
