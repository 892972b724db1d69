"""A numeric test of a third-party kernel on a small input, before it is trusted with a call.

Versions of such kernels differ in what they support and some ignore an argument without a word
(FlashAttention-4 on Ampere computes dense attention when it is given block lists), so their
signatures prove nothing. The input contains what calls contain: ragged lengths, a query block
without keys, padded keys that hold NaN.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.ops import Attended, AttentionCall, attention
from dit_sparse.kernels.reference_fp8 import ReferenceFp8
from dit_sparse.mask import BlockMask, block_count

logger = logging.getLogger(__name__)

_SEQ = (300, 333)


@dataclass(frozen=True)
class ShapeClass:
    """Calls that a kernel computes by the same code.

    Attributes:
        device: Where.
        dtype: Of q, k and v.
        dim: Head dimension.
        block: Tokens in a (query, key) block of the mask; None for dense attention.
        shared: Whether one mask serves all batch elements, and all heads, of several.
        padded: Whether some keys do not exist.
        precision: Of the products.
    """

    device: torch.device
    dtype: torch.dtype
    dim: int
    block: tuple[int, int] | None
    shared: tuple[bool, bool] = (False, False)
    padded: bool = False
    precision: str = "model"

    @classmethod
    def of(cls, call: AttentionCall) -> ShapeClass:
        """The class of ``call``; looks at shapes and types alone."""
        q, mask = call.q, call.mask
        block, shared = None, (False, False)
        if mask is not None:
            block = mask.block
            shared = (q.shape[0] > mask.shape[0], q.shape[2] > mask.shape[1])
        padded = call.key_valid is not None
        return cls(q.device, q.dtype, q.shape[-1], block, shared, padded, call.precision)

    def example(self) -> AttentionCall:
        """A small call of this class, always the same one."""
        rng = torch.Generator().manual_seed(0)
        batch, heads = 2, 2
        q, k, v = (
            torch.randn(batch, n, heads, self.dim, generator=rng).to(self.device, self.dtype)
            for n in (_SEQ[0], _SEQ[1], _SEQ[1])
        )
        mask = key_valid = None
        if self.block is not None:
            blocks = [block_count(n, size) for n, size in zip(_SEQ, self.block, strict=True)]
            keep = torch.rand(*(1 if s else 2 for s in self.shared), *blocks, generator=rng) < 0.6
            keep[..., 0] = False  # a block that nobody reads
            keep[..., 0, -1] = True  # the ragged one
            keep[:, 0, -1] = False  # queries without keys
            mask = BlockMask.from_dense(keep.to(self.device), self.block, _SEQ)
            unseen = ~mask.tokens().any(2).expand(batch, heads, _SEQ[1]).transpose(1, 2)
            for x in (k, v):
                x.masked_fill_(unseen.unsqueeze(-1), float("nan"))
        if self.padded:
            key_valid = torch.ones(batch, _SEQ[1], dtype=torch.bool)
            key_valid[0, 250:] = False
            key_valid[1, 150] = False
            key_valid = key_valid.to(self.device)
            for x in (k, v):
                x.masked_fill_(~key_valid[..., None, None], float("nan"))
        return AttentionCall(q, k, v, mask, key_valid, self.dim**-0.5, precision=self.precision)


@lru_cache(maxsize=256)
def probe(
    name: str,
    run: Callable[[Any], Any],
    kind: Any,
    test: Callable[[Any, Any], str | None] | None = None,
) -> str | None:
    """Why ``run`` is not trusted with calls of ``kind``; None if its example came out right.

    Tested once in a process, by ``test`` or else by :func:`disagreement`; a failure is logged then.
    """
    try:
        found = (test or disagreement)(run, kind)
    except Exception as error:  # whatever the compiler or the checks of another project raise
        found = f"it raised {type(error).__name__}: {error}"
    if found is None:
        return None
    reason = f"failed the test of this kind of call on a small input: {found}"
    logger.warning("%s is not used for %s: it %s", name, kind, reason)
    return reason


def probe_reasons(
    name: str, run: Callable[[AttentionCall], Attended], call: AttentionCall
) -> list[str]:
    """:func:`probe` for the class of ``call``, as reasons of an implementation."""
    return reasons(name, run, ShapeClass.of(call))


def reasons(
    name: str,
    run: Callable[[Any], Any],
    kind: Any,
    test: Callable[[Any, Any], str | None] | None = None,
) -> list[str]:
    """:func:`probe` as reasons of an implementation."""
    if torch.cuda.is_current_stream_capturing():
        return ["is tested before its first use, which a CUDA graph cannot record; warm it up"]
    failed = probe(name, run, kind, test)
    return [] if failed is None else [failed]


def disagreement(run: Callable[[AttentionCall], Attended], kind: ShapeClass) -> str | None:
    """How ``run`` differs from the fp64 reference on the example of ``kind``; None if it does not.

    No tolerance is set by hand: an error may be twice that of torch's own attention in the same
    dtype, in 8 bits that of the reference, plus one rounding of the largest value. Waits for the
    device.
    """
    call = kind.example()
    assert call.v is not None
    found = run(call)
    wide = (call.q.double(), call.k.double(), call.v.double())
    truth = attention(*wide, call.mask, key_valid=call.key_valid, impl="reference")
    live = truth.lse.isfinite()
    q, k, v = (x.nan_to_num(0.0).transpose(1, 2) for x in (call.q, call.k, call.v))
    seen = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    if call.mask is not None:
        seen = seen & call.mask.lists().tokens()
    if call.key_valid is not None:
        seen = seen & call.key_valid[:, None, None]
    peer = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=call.scale)
    scores = call.scale * (q.float() @ k.float().mT)
    size = float((call.scale * (q.float().abs() @ k.float().abs().mT)).max())
    peer_lse = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)

    if kind.precision != "model":
        rounded = ReferenceFp8()(replace(call, q=wide[0], k=wide[1], v=wide[2]))
        peer, peer_lse = rounded.out.transpose(1, 2), rounded.lse
    exact, mine = truth.out.transpose(1, 2), found.out.transpose(1, 2)
    rounding = torch.finfo(call.q.dtype).eps * float(exact.abs().max())
    errors = {
        "output": (worst(mine[live], exact[live]), worst(peer[live], exact[live]) + rounding),
        "LSE": (
            worst(found.lse[live], truth.lse[live]),
            worst(peer_lse[live], truth.lse[live]) + torch.finfo(torch.float32).eps * size,
        ),
    }
    for name, (error, budget) in errors.items():
        if not error <= 2 * budget:
            return f"its {name} is off by {error:.1e} where at most {2 * budget:.1e} is right"
    if not (found.lse[~live] == float("-inf")).all() or not (mine[~live] == 0).all():
        return "a query without keys gets an output other than 0 or an LSE other than -inf"
    return None


def worst(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; 0 of nothing."""
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
