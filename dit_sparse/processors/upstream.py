"""What upstream knows about a processor and what it would compute in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_sparse.kernels.native_lse import native_attention_with_lse


def upstream_attention(
    processor: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    sdpa: bool,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention as upstream computes it, bit for bit, and its row LSE if that is free.

    Args:
        processor: The attention processor; it may name a backend.
        q: Queries ``[batch, q_len, heads, dim]``.
        k: Keys ``[batch, kv_len, heads, dim]``.
        v: Values, as ``k``.
        attn_mask: The model's mask.
        scale: Factor on the scores, or None for ``dim ** -0.5``.
        sdpa: Whether the processor calls scaled_dot_product_attention itself, which heeds no
            backend, and not diffusers' dispatcher.
        with_lse: Whether the log-sum-exp is asked for.

    Returns:
        ``out [batch, q_len, heads, dim]`` and ``lse [batch, heads, q_len]`` fp32, or None where it
        was not asked for or the backend does not tell it.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )

    # Read at each call: set_attention_backend may come before or after us.
    backend = getattr(processor, "_attention_backend", None)
    if with_lse and attn_mask is None:
        active = backend or _AttentionBackendRegistry.get_active_backend()[0]
        if sdpa or active == AttentionBackendName.NATIVE:
            found = native_attention_with_lse(q, k, v, scale)
            if found is not None:
                return found
    if sdpa:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)
        return out.transpose(1, 2), None
    out = dispatch_attention_fn(
        q,
        k,
        v,
        attn_mask=attn_mask,
        dropout_p=0.0,
        is_causal=False,
        scale=scale,
        backend=backend,
    )
    return out, None


def register_like(kind: type, base: type) -> None:
    """Makes guiders that skip attention layers (SLG) take ``kind`` for ``base``.

    They look processors up by class. A base that they do not know stays unknown.
    """
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    try:
        metadata = AttentionProcessorRegistry.get(base)
    except ValueError:
        return
    AttentionProcessorRegistry.register(kind, metadata)


def skips_scores() -> bool:
    """Whether a guider (PAG) puts the values in the place of attention here and now.

    diffusers does that with a function mode around the attention module, which sees upstream's
    attention call but neither kernels nor the inside of an operator. torch.compile traces this.
    """
    for index in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(index)
        if type(mode).__name__ == "AttentionScoreSkipFunctionMode":
            return True
    return False
