"""PyTorch's own attention together with the log-sum-exp that its kernel computes anyway.

``F.scaled_dot_product_attention`` picks a kernel and throws that kernel's LSE away. Calling the
same kernel directly gives the same output, bit for bit, and saves a pass over queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend


def native_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor] | None:
    """Dense attention as ``F.scaled_dot_product_attention`` computes it, with its LSE.

    Args:
        q: Queries ``[batch, q_len, heads, dim]``.
        k: Keys ``[batch, kv_len, heads, dim]``.
        v: Values, as ``k``.
        scale: Factor on the scores; ``dim ** -0.5`` if None.

    Returns:
        ``out [batch, q_len, heads, dim]`` and ``lse [batch, heads, q_len]`` (natural logarithm,
        scale included), or None where PyTorch would pick a kernel that keeps no LSE at inference
        or pads the head dimension first.
    """
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    choice = torch._fused_sdp_choice(query, key, value, scale=scale)
    if q.shape[-1] % 8 or q.device.type not in ("cpu", "cuda"):
        return None
    if choice == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = cudnn_attention_with_lse(query, key, value, scale)
    elif choice == SDPBackend.FLASH_ATTENTION.value:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        if q.device.type == "cpu":
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(query, key, value, scale=scale)[:2]
    else:
        return None
    return out.transpose(1, 2), lse


def cudnn_attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """cuDNN's dense attention on ``[batch, heads, tokens, dim]`` and its LSE, without the last."""
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, False, False, scale=scale
    )[:2]
    return out, lse.view(query.shape[:3])
