"""Correctness of neighborhood attention against the fp64 reference.

``python -m benchmarks.check_neighborhood`` prints one line for each case and dtype, and exits with
1 if any is wrong. The tests run the small cases. Budgets as in `benchmarks.check_kernels`: twice
the error of torch's own attention under the same mask, plus one rounding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.check_kernels import Finding, _worst, poisoned_memory
from dit_sparse.kernels import ops
from dit_sparse.layout import TokenLayout
from dit_sparse.neighborhood import Neighborhood
from dit_sparse.neighborhood_mask import NeighborhoodMask, arrange


@dataclass(frozen=True)
class Case:
    """Windows on a grid, and the hazards of the call.

    Attributes:
        name: Readable id.
        grid: Video tokens.
        window: Keyword arguments of :meth:`Neighborhood.on`.
        tile: Token order.
        text: Text tokens.
        block: Tokens in a block.
        padding: Marks keys invalid, text and video, and fills them with NaN.
        fused: Whether q, k and v are slices of one tensor.
    """

    name: str
    grid: tuple[int, int, int]
    window: dict = field(hash=False)
    tile: tuple[int, int, int]
    text: int = 0
    block: int = 64
    dim: int = 64
    batch: int = 1
    heads: int = 2
    padding: bool = False
    fused: bool = False


CASES = (
    Case("full-and-partial", (2, 8, 16), {"window": (2, 8, 11)}, (2, 8, 4)),
    Case("all-partial", (3, 7, 9), {"window": (2, 3, 3)}, (2, 4, 8), batch=2, padding=True),
    Case("block-sparse", (1, 16, 32), {"window": (1, 16, 24), "stride": (1, 1, 8)}, (1, 16, 8)),
    Case("one-axis-128", (4, 8, 10), {"window": (3, -1, -1)}, (1, 8, 10), block=128, dim=128),
    Case("strided-text", (2, 9, 10), {"window": (1, 6, 5), "stride": (1, 3, 5)}, (2, 3, 5), 23),
    Case("dilated", (1, 13, 17), {"window": (1, 3, 5), "dilation": (1, 3, 2)}, (1, 4, 4), 5),
    Case("causal", (5, 6, 7), {"window": (3, 5, -1), "causal": (True, False, True)}, (1, 6, 7)),
    Case("padding", (3, 7, 9), {"window": (3, 4, 5)}, (3, 4, 4), 40, batch=2, padding=True),
    Case("padding-128", (3, 7, 9), {"window": 3}, (3, 4, 4), 9, 128, 40, 2, padding=True),
    Case("fused-256", (1, 12, 13), {"window": (1, 5, 6)}, (1, 4, 4), 3, dim=256, fused=True),
)
# Too slow for the interpreter.
LARGE_CASES = (
    Case("large-128", (9, 15, 20), {"window": (5, 7, 9)}, (3, 5, 8), 226, 128, 128, padding=True),
    Case(
        "large-strided", (8, 24, 20), {"window": (8, 24, 12), "stride": (1, 1, 4)}, (8, 24, 4),
        77, 128, 64,
    ),
    Case("large-dilated", (1, 60, 52), {"window": (1, 9, 9), "dilation": (1, 4, 3)}, (1, 15, 18)),
)  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """Inputs of a case; keys and values of padding hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: NeighborhoodMask
    key_valid: Tensor | None
    keep: Tensor  # [batch, 1, tokens, tokens]


def build(case: Case, dtype: torch.dtype, device: str) -> Operands:
    """Quantised random inputs of ``case``."""
    rng = torch.Generator().manual_seed(0)
    layout = TokenLayout(case.grid, case.text)
    shape = (case.batch, layout.tokens, 3, case.heads, case.dim)
    q, k, v = torch.randn(shape, generator=rng).to(dtype).unbind(2)
    if not case.fused:
        q, k, v = (x.contiguous() for x in (q, k, v))
    neighborhood = Neighborhood.on(case.grid, **case.window)
    mask = arrange(layout, neighborhood, case.tile, case.block, torch.device("cpu")).mask
    positions = torch.arange(layout.tokens)
    keep = mask.visible(positions, positions).expand(case.batch, 1, -1, -1)
    key_valid = None
    if case.padding:
        key_valid = torch.ones(case.batch, layout.tokens, dtype=torch.bool)
        key_valid[0, -5:] = False
        key_valid[-1, 1:64] = False
        keep = keep & key_valid[:, None, None]
        for x in (k, v):
            x.masked_fill_(~key_valid[..., None, None], float("nan"))
    moved = [x.to(device) for x in (q, k, v)]
    valid = None if key_valid is None else key_valid.to(device)
    return Operands(*moved, mask.to(device), valid, keep.to(device))


def check(case: Case, dtype: torch.dtype, device: str, impl: str) -> list[Finding]:
    """Errors of :func:`ops.neighborhood_attention`."""
    x = build(case, dtype, device)
    options = {"key_valid": x.key_valid}
    wide = [t.double() for t in (x.q, x.k, x.v)]
    exact = ops.neighborhood_attention(*wide, x.mask, **options, impl="reference")
    with poisoned_memory():
        found = ops.neighborhood_attention(x.q, x.k, x.v, x.mask, **options, impl=impl)
    q, k, v = (t.nan_to_num(0.0).transpose(1, 2) for t in (x.q, x.k, x.v))
    live = x.keep.any(-1).expand(-1, case.heads, -1)
    truth, mine = exact.out.transpose(1, 2), found.out.transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=x.keep)
    scale = case.dim**-0.5
    scores = scale * (q.float() @ k.float().mT)
    eager = scores.masked_fill(~x.keep, float("-inf")).logsumexp(-1)
    size = float((scale * (q.float().abs() @ k.float().abs().mT)).max())
    eps = torch.finfo(dtype).eps
    out_budget = 2 * (_worst(theirs[live], truth[live]) + eps * float(truth[live].abs().max()))
    rounding = torch.finfo(torch.float32).eps * size
    return [
        Finding("out", _worst(mine[live], truth[live]), out_budget),
        Finding("empty rows", _worst(mine[~live], torch.zeros_like(mine[~live])), 0.0),
        Finding("lse", _worst(found.lse, exact.lse), 2 * (_worst(eager, exact.lse) + rounding)),
    ]


def run() -> bool:
    """Prints one line for each check on the GPU; whether all passed."""
    good = True
    for case in CASES + LARGE_CASES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            findings = check(case, dtype, "cuda", "triton")
            passed = all(f.passed for f in findings)
            good &= passed
            details = "  ".join(f"{f.quantity} {f.error:.1e} <= {f.budget:.1e}" for f in findings)
            label = f"{case.name} {str(dtype).removeprefix('torch.')}"
            print(f"{'ok  ' if passed else 'FAIL'} {label:32s} {details}", flush=True)
    return good


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; without one run the tests, which use triton's interpreter")
    sys.exit(0 if run() else 1)
