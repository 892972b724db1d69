"""What attention in 8 bits computes: the rounding of its operands, without a kernel.

Queries and keys, and with ``"fp8_qkpv"`` weights and values too, are rounded to e4m3 (4 exponent
and 3 mantissa bits, at most 448) after division by a scale that makes the largest of a group 448:

* queries: one scale a token;
* keys: one scale a block of tokens of the mask, after a vector common to all keys of a head is
  subtracted. It adds the same to all scores of a row, which the softmax does not see; the
  log-sum-exp gets it back, so that it stays that of the scores. An offset that all keys share would
  otherwise take up their three bits;
* values: one scale a channel of a head;
* weights: ``exp(score - row's largest)`` in [0, 1], times ``2 ** WEIGHT_BITS``. Their sum is that
  of the unrounded weights.

Everything else is in the kernel's working precision.

Source: smoothing of keys is SageAttention's (arXiv 2410.02367, section 4.2), weights and values in
e4m3 are FlashAttention-3's (arXiv 2407.08608, section 3.3) and SageAttention2's (arXiv 2411.10958).
There the mean of all keys is subtracted; any vector is exact, so that here a sample of them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_sparse.mask import block_count

if TYPE_CHECKING:
    from dit_sparse.kernels.ops import AttentionCall

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# Keys that are averaged at most for what is subtracted from all of them.
SAMPLES = 4096
# The largest weight is the largest power of two in e4m3.
WEIGHT_BITS = 8
# Groups below it become 0: their scale would be no normal number in fp32.
SMALLEST = 1e-30
# Keys of one scale where there is no mask.
KEY_BLOCK = 128


def key_block(call: AttentionCall) -> int:
    """Keys that share a scale."""
    return KEY_BLOCK if call.mask is None else call.mask.block[1]


def round_e4m3(x: Tensor) -> Tensor:
    """``x`` as e4m3 would hold it, in its own dtype."""
    return x.to(E4M3).to(x.dtype)


def scales(largest: Tensor) -> Tensor:
    """Scales of groups whose largest magnitudes are ``largest``; 1 where these are next to 0."""
    return torch.where(largest < SMALLEST, 1.0, largest / LARGEST)


def key_shift(k: Tensor, key_valid: Tensor | None) -> Tensor:
    """What is subtracted from all keys of a head: the mean of those evenly spaced ones that exist.

    What is not finite counts as 0: blocks that nobody reads may hold anything.

    Args:
        k: ``[batch, kv_len, heads, dim]`` in working precision.
        key_valid: ``[batch, kv_len]`` bool or None.

    Returns:
        ``[batch, 1, heads, dim]``.
    """
    tokens = k.shape[1]
    count = min(tokens, SAMPLES)
    chosen = torch.arange(count, device=k.device) * tokens // max(count, 1)
    sample = k[:, chosen]
    exists = torch.ones(sample.shape[:2], dtype=torch.bool, device=k.device)
    if key_valid is not None:
        exists = key_valid[:, chosen]
    sample = sample.where(exists[..., None, None] & sample.isfinite(), 0.0)
    return sample.sum(1, keepdim=True) / exists.sum(1).clamp(min=1)[:, None, None, None]


def rounded_scores(call: AttentionCall, work: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as the first product sees them, and what their scores lack.

    Args:
        call: The call.
        work: Dtype of the results.

    Returns:
        ``[batch, q_len, heads, dim]``, ``[batch, kv_len, heads, dim]`` (0 where keys do not exist)
        and ``[batch, heads, q_len]``, which is added to a row's log-sum-exp.
    """
    q, k = call.q.to(work), call.k.to(work)
    shift = key_shift(k, call.key_valid)
    lift = call.scale * (q * shift).sum(-1).transpose(1, 2)
    step = scales(q.abs().amax(-1, keepdim=True))
    q = round_e4m3(q / step) * step
    k = k - shift
    if call.key_valid is not None:
        k = k.masked_fill(~call.key_valid[..., None, None], 0.0)
    size, tokens = key_block(call), k.shape[1]
    blocks = pad(k, (0, 0, 0, 0, 0, block_count(tokens, size) * size - tokens))
    blocks = blocks.unflatten(1, (-1, size))  # [batch, blocks, size, heads, dim]
    step = scales(blocks.abs().amax((2, 4), keepdim=True))
    k = (round_e4m3(blocks / step) * step).flatten(1, 2)[:, :tokens]
    return q, k, lift


def rounded_values(call: AttentionCall, work: torch.dtype) -> Tensor:
    """Values as the second product sees them, ``[batch, kv_len, heads, dim]``."""
    assert call.v is not None
    v = call.v.to(work)
    if call.key_valid is not None:
        v = v.masked_fill(~call.key_valid[..., None, None], 0.0)
    step = scales(v.abs().where(v.isfinite(), 0.0).amax(1, keepdim=True))
    return round_e4m3(v / step) * step


def round_weights(weights: Tensor) -> Tensor:
    """Weights in [0, 1] as the second product sees them."""
    return round_e4m3(weights * 2.0**WEIGHT_BITS) / 2.0**WEIGHT_BITS
