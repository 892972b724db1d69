"""Correctness of banded attention against the fp64 reference.

``python -m benchmarks.check_bands`` prints one line for each case and path, and exits with 1 if any
is wrong. The tests run the same cases, ``benchmarks.bands`` runs them before it measures. Budgets
are those of ``benchmarks.check_kernels``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.check_kernels import Case, Finding, _worst, build, poisoned_memory
from dit_sparse.bands import FULL, SKIP, BandMask, HeadPattern
from dit_sparse.kernels import ops
from dit_sparse.kernels.triton_attention import choose_path
from dit_sparse.kernels.triton_band import launch
from dit_sparse.layout import TokenLayout


@dataclass(frozen=True)
class BandCase:
    """Sizes of a call, its patterns and the hazards it contains.

    Attributes:
        name: Readable id.
        heads: Pattern of each head.
        grid: Video tokens (frames, height, width).
        text: Text tokens before and after the video.
        block: Tokens in a block.
        dim: Head dimension.
        batch: Batch size.
        padding: Marks keys invalid, at the end and in the middle, and fills them with NaN.
        memory: Layout in memory, see ``Case.layout``.
    """

    name: str
    heads: tuple[HeadPattern, ...]
    grid: tuple[int, int, int] = (3, 6, 12)
    text: tuple[int, int] = (0, 0)
    block: int = 64
    dim: int = 64
    batch: int = 1
    padding: bool = False
    memory: str = "blhd"

    @property
    def bands(self) -> BandMask:
        return BandMask(self.heads, self.block, TokenLayout.around(self.grid, *self.text))


FIVE = (
    FULL,
    SKIP,
    HeadPattern(1),
    HeadPattern(0, order="position_major"),
    HeadPattern(columns=2, shift=0.5),
)
BOTH = (
    HeadPattern(0, columns=2, order="position_major"),
    HeadPattern(0, columns=3, shift=0.9),
)
CASES = (
    BandCase("five", FIVE),
    BandCase("text-last", FIVE[2:], text=(0, 37), memory="fused"),
    BandCase("five-text-first", FIVE, (3, 5, 11), text=(70, 0), padding=True),
    BandCase("text-on-both-sides", FIVE[2:], (3, 5, 11), text=(40, 30), padding=True),
    BandCase("blocks-of-128", FIVE[3:], (2, 9, 17), text=(0, 20), block=128, dim=128),
    BandCase("even", FIVE[2:], (4, 6, 8)),
    BandCase("band-and-columns", BOTH, text=(0, 1), batch=2),
    BandCase("padding", (BOTH[0], FIVE[2]), padding=True, memory="bhld", dim=40),
    BandCase("image", FIVE[3:], (1, 13, 17), text=(5, 0)),
    BandCase("less-than-a-block", (HeadPattern(0), SKIP), (1, 3, 5), text=(0, 9)),
    BandCase("all-skipped", (SKIP, SKIP), memory="strided", dim=40),
)
LARGE_CASES = (
    BandCase("large", FIVE + BOTH, (9, 15, 26), text=(226, 0), block=128),
    BandCase("large-128", FIVE + BOTH, (9, 15, 26), block=128, dim=128),
    BandCase(
        "large-padding", FIVE + BOTH, (9, 15, 26), text=(0, 256), block=128, dim=128, padding=True
    ),
    BandCase("large-64", FIVE + BOTH, (13, 11, 17), batch=2, memory="bhld"),
)


@dataclass(frozen=True)
class Inputs:
    """Operands of one case, with NaN wherever no result may depend on them."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_valid: Tensor | None
    keep: Tensor  # the pairs that count, [batch, heads, tokens, tokens]

    def call(self, bands: BandMask) -> ops.BandedCall:
        scale = self.q.shape[-1] ** -0.5
        return ops.BandedCall(self.q, self.k, self.v, bands, self.key_valid, scale)


def build_bands(case: BandCase, dtype: torch.dtype, device: str) -> Inputs:
    """Random operands of ``case``; keys and values that no query may see hold NaN."""
    bands = case.bands
    tokens, heads = bands.layout.tokens, len(case.heads)
    x = build(
        Case(
            case.name,
            (tokens, tokens),
            case.dim,
            None,
            padding=case.padding,
            layout=case.memory,
            batch=case.batch,
            heads=heads,
        ),
        dtype,
        device,
    )
    keep = torch.stack([bands.tokens(head) for head in range(heads)]).to(device)
    unseen = ~keep.any(1).T.expand(case.batch, -1, -1)  # [batch, tokens, heads]
    x.k.masked_fill_(unseen[..., None], float("nan"))
    x.v.masked_fill_(unseen[..., None], float("nan"))
    keep = keep.expand(case.batch, -1, -1, -1)
    if x.key_valid is not None:
        keep = keep & x.key_valid[:, None, None]
    return Inputs(x.q, x.k, x.v, x.key_valid, keep)


def check(case: BandCase, dtype: torch.dtype, device: str, path: str) -> list[Finding]:
    """Errors of banded attention, with the budgets of ``benchmarks.check_kernels``.

    Args:
        case: What to compute.
        dtype: Dtype of the inputs.
        device: Where.
        path: An implementation as users name it (``"triton"``, ``"cpu"``), or a path of the Triton
            launcher.
    """
    x, bands = build_bands(case, dtype, device), case.bands
    with poisoned_memory():
        if path in ("pointer", "tma"):
            found = launch(x.call(bands), path)
        else:
            found = ops.banded_attention(x.q, x.k, x.v, bands, key_valid=x.key_valid, impl=path)
    truth = ops.banded_attention(
        x.q.double(), x.k.double(), x.v.double(), bands, key_valid=x.key_valid, impl="reference"
    )
    q, k, v = (t.nan_to_num(0.0).transpose(1, 2) for t in (x.q, x.k, x.v))
    live = x.keep.any(-1)
    exact, mine = truth.out.transpose(1, 2), found.out.transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=x.keep)[live]
    scale = case.dim**-0.5
    scores = scale * (q.float() @ k.float().mT)
    eager = scores.masked_fill(~x.keep, float("-inf")).logsumexp(-1)
    size = float((scale * (q.float().abs() @ k.float().abs().mT)).max())
    largest = float(exact.abs().max())
    return [
        Finding(
            "out",
            _worst(mine[live], exact[live]),
            2 * (_worst(theirs, exact[live]) + torch.finfo(dtype).eps * largest),
        ),
        Finding("empty rows", _worst(mine[~live], torch.zeros_like(mine[~live])), 0.0),
        Finding(
            "lse",
            _worst(found.lse, truth.lse),
            2 * (_worst(eager, truth.lse) + torch.finfo(torch.float32).eps * size),
        ),
    ]


def check_far(device: str) -> list[Finding]:
    """The last blocks of sequences beyond 2**31 elements, in both token orders; about 25 GiB."""
    layout, heads, dim, block = TokenLayout((110, 50, 80)), 40, 128, 128
    kinds = (HeadPattern(0), HeadPattern(0, order="position_major"))
    bands = BandMask(kinds * (heads // 2), block, layout)
    rng = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    q, k, v = (torch.zeros(1, layout.tokens, heads, dim, **options) for _ in range(3))
    # The last block in the order of its head, ragged or whole, attends to itself alone.
    size = layout.tokens % block or block
    places = []
    for kind in range(2):
        order = bands.ordering(kinds[kind].order, torch.device(device))
        last = torch.arange(layout.tokens - size, layout.tokens, device=device)
        places.append(last if order is None else order.perm[last])
        for tensor in (q, k, v):
            drawn = torch.randn(1, size, heads // 2, dim, generator=rng, **options)
            tensor[:, places[kind], kind::2] = drawn
    found = ops.banded_attention(q, k, v, bands, impl="triton")
    findings = []
    for kind in range(2):
        small = [t[:, places[kind], kind::2].transpose(1, 2) for t in (q, k, v)]
        truth = F.scaled_dot_product_attention(*(t.double() for t in small))
        theirs = F.scaled_dot_product_attention(*small)
        rounding = torch.finfo(torch.bfloat16).eps * float(truth.abs().max())
        mine = found.out[:, places[kind], kind::2].transpose(1, 2)
        budget = 2 * (_worst(theirs, truth) + rounding)
        findings.append(Finding(kinds[kind].order, _worst(mine, truth), budget))
    return findings


def tma_refused(case: BandCase, dtype: torch.dtype, device: str) -> bool:
    """Whether ``case`` cannot take the TMA path."""
    x = build_bands(case, dtype, device)
    return choose_path(ops.AttentionCall(x.q, x.k, x.v, None, None, 1.0)) != "tma"


def correct(cases: tuple[BandCase, ...], device: str, dtype: torch.dtype) -> bool:
    """Whether banded attention is right in every case, on every path."""
    good = True
    for case in cases:
        for path in ("pointer", "tma"):
            if path == "tma" and tma_refused(case, dtype, device):
                continue
            findings = check(case, dtype, device, path)
            good &= all(f.passed for f in findings)
            _report(path, case.name, findings)
    if device != "cpu":
        findings = check_far(device)
        good &= all(f.passed for f in findings)
        _report("triton", "past 2**31 elements", findings)
    return good


def _report(path: str, name: str, findings: list[Finding]) -> None:
    passed = all(f.passed for f in findings)
    details = "  ".join(f"{f.quantity} {f.error:.1e} <= {f.budget:.1e}" for f in findings)
    print(f"{'ok  ' if passed else 'FAIL'} {path:8s} {name:28s} {details}", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; without one run the tests, which use triton's interpreter")
    sys.exit(0 if correct(CASES + LARGE_CASES, "cuda", torch.bfloat16) else 1)
