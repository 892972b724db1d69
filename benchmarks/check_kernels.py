"""Correctness of the Triton kernels against the fp64 reference.

``python -m benchmarks.check_kernels`` prints one line for each case, path and dtype, and exits with
1 if any is wrong; it needs only torch and triton. Most of its time is compiling: ``--processes 12``
does that side by side. The tests run the same cases.

No tolerance is set by hand. An error must be at most twice the error of torch's own computation
in the same dtype plus one rounding of the largest value.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import flash3_attention as flash3
from dit_sparse.kernels import flash4_attention as flash4
from dit_sparse.kernels import ops, triton_fp8
from dit_sparse.kernels.reference_fp8 import ReferenceFp8
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.kernels.triton_block_mass import Path
from dit_sparse.kernels.triton_block_mass import hopper_reasons as hopper_mass_reasons
from dit_sparse.kernels.triton_block_mass import launch as launch_block_mass
from dit_sparse.kernels.triton_mask import expand
from dit_sparse.mask import BlockMask, block_count

# Implementations of attention by kernels of other projects; checked where they are installed.
OTHERS = ("cudnn", "flash-attn-3", "flash-attn-4")


@dataclass(frozen=True)
class Case:
    """Sizes of a call and the hazards it contains.

    Attributes:
        name: Readable id.
        seq: Query and key tokens.
        dim: Head dimension.
        block: Tokens in a (query, key) block of the mask; None for dense.
        mask: Batch and heads of the mask.
        padding: Marks keys invalid, at the end and in the middle, and fills them with NaN.
        layout: ``"blhd"`` contiguous, ``"bhld"`` contiguous and transposed, ``"fused"`` slices of
            one tensor of q, k and v, ``"strided"`` a last dimension with stride 2.
        skip_head: Whether head 0 keeps nothing at all.
    """

    name: str
    seq: tuple[int, int] = (150, 200)
    dim: int = 64
    block: tuple[int, int] | None = (64, 64)
    mask: tuple[int, int] = (2, 2)
    padding: bool = False
    layout: str = "blhd"
    skip_head: bool = False
    batch: int = 2
    heads: int = 2


CASES = (
    Case("dense", block=None),
    Case("dense-padding", block=None, padding=True, dim=40),
    Case("even", (128, 256)),
    Case("ragged-padding", padding=True),
    Case("blocks-64x128", block=(64, 128), dim=96),
    Case("blocks-128x64", block=(128, 64), padding=True),
    Case("blocks-128", (130, 300), block=(128, 128), dim=128, batch=1, mask=(1, 2)),
    Case("one-key", (3, 1), block=(64, 64)),
    Case("shared-mask", mask=(1, 1), padding=True),
    Case("shared-batch", mask=(1, 2)),
    Case("shared-heads", mask=(2, 1)),
    Case("layout-bhld", layout="bhld"),
    Case("layout-fused", layout="fused", padding=True),
    Case("layout-strided", layout="strided", dim=40),
    Case("skipped-head", skip_head=True),
)
# Too slow for the interpreter.
LARGE_CASES = (
    Case("large-128", (2111, 2333), 128, (128, 128), padding=True),
    Case("large-64", (2111, 2333), 64, (128, 64)),
    Case("large-dense", (2048, 2048), 128, None),
    Case("large-dense-ragged", (2111, 2333), 64, None),
    Case("large-256", (1111, 1333), 256, (128, 128), padding=True),
    Case("large-bhld", (2111, 2333), 128, (64, 128), layout="bhld"),
    Case("hopper-128", (2111, 2333), 128, (128, 64), padding=True),
    Case("hopper-even", (2048, 4096), 128, (128, 64)),
    Case("hopper-64", (2111, 2333), 64, (128, 128), padding=True, layout="fused"),
    Case("hopper-one-row", (100, 300), 128, (128, 128), mask=(1, 1), skip_head=True),
    Case("hopper-one-block", (300, 60), 128, (128, 128), layout="bhld"),
)


# The kinds of call that `benchmarks.kernels` times.
BENCHMARK_CASES = (
    Case("dense-64", (1024, 1024), 64, None, batch=1),
    Case("dense-128", (1024, 1024), 128, None, batch=1),
    Case("blocks-64-dim-64", (1024, 1024), 64, (64, 64), (1, 2), batch=1),
    Case("blocks-64-dim-128", (1024, 1024), 128, (64, 64), (1, 2), batch=1),
    Case("blocks-128-dim-64", (1024, 1024), 64, (128, 128), (1, 2), batch=1),
    Case("blocks-128-dim-128", (1024, 1024), 128, (128, 128), (1, 2), batch=1),
)


@dataclass(frozen=True)
class Operands:
    """Inputs of one case; ``k`` and ``v`` hold NaN wherever no result may depend on them."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None
    key_valid: Tensor | None


def _tensor(shape: tuple[int, ...], case: Case, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    batch, tokens, heads, dim = shape
    if case.layout == "bhld":
        return torch.randn(batch, heads, tokens, dim, generator=rng).to(dtype).transpose(1, 2)
    if case.layout == "fused":
        return torch.randn(batch, tokens, 3, heads, dim, generator=rng).to(dtype)[:, :, 1]
    if case.layout == "strided":
        return torch.randn(batch, tokens, heads, 2 * dim, generator=rng).to(dtype)[..., ::2]
    return torch.randn(batch, tokens, heads, dim, generator=rng).to(dtype)


def build(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Operands:
    """Quantised random inputs of ``case``, poisoned with NaN."""
    rng = torch.Generator().manual_seed(seed)
    (q_len, kv_len), tail = case.seq, (case.heads, case.dim)
    q = _tensor((case.batch, q_len, *tail), case, dtype, rng)
    k = _tensor((case.batch, kv_len, *tail), case, dtype, rng)
    v = _tensor((case.batch, kv_len, *tail), case, dtype, rng)
    mask = key_valid = None
    if case.block is not None:
        shape = (block_count(q_len, case.block[0]), block_count(kv_len, case.block[1]))
        keep = torch.rand(*case.mask, *shape, generator=rng) < 0.5
        keep[..., -1] |= torch.rand(keep.shape[:-1], generator=rng) < 0.5
        if shape[1] > 1:
            keep[:, 0, :, 0] = False
        if shape[0] > 1:
            keep[0, -1, 1] = False
        if case.skip_head:
            keep[:, 0] = False
        mask = BlockMask.from_dense(keep, case.block, case.seq)
        listed = torch.arange(shape[1]) < mask.kv_num_blocks.unsqueeze(-1)
        # Entries past the count must not be read: such a block would be far out of memory.
        mask = BlockMask(
            mask.kv_num_blocks, mask.kv_indices.where(listed, 1 << 30), mask.block, mask.seq
        )
        seen = mask.tokens().any(2).expand(case.batch, case.heads, kv_len).transpose(1, 2)
        k[~seen], v[~seen] = float("nan"), float("nan")
    if case.padding:
        key_valid = torch.ones(case.batch, kv_len, dtype=torch.bool)
        key_valid[0, -min(70, kv_len // 2) :] = False
        key_valid[-1, kv_len // 2] = False
        k[~key_valid], v[~key_valid] = float("nan"), float("nan")
    # `to` keeps strides of a dense tensor only; the layouts are made again on the device.
    on_device = [_same_layout(t, device) for t in (q, k, v)]
    return Operands(
        *on_device,
        mask if mask is None else mask.to(device),
        key_valid if key_valid is None else key_valid.to(device),
    )


def _same_layout(tensor: Tensor, device: str) -> Tensor:
    storage = tensor.untyped_storage()
    flat = torch.empty(0, dtype=tensor.dtype).set_(storage).to(device)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass(frozen=True)
class Finding:
    """One quantity of one case: its largest error and what that may be."""

    quantity: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


def _worst(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN stays NaN, equal infinities differ by 0."""
    difference = (a.double() - b.double()).abs().masked_fill(a.double() == b.double(), 0.0)
    return float(difference.max()) if difference.numel() else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that an output that is not written shows."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def check_attention(case: Case, dtype: torch.dtype, device: str, path: str) -> list[Finding]:
    """Errors of attention and row_lse.

    Args:
        case: What to compute.
        dtype: Dtype of the inputs.
        device: Where.
        path: The name of an implementation as users call it, else a path of the Triton launcher.
    """
    x = build(case, dtype, device)
    if path in ("triton", *OTHERS):
        with poisoned_memory():
            found = ops.attention(x.q, x.k, x.v, x.mask, key_valid=x.key_valid, impl=path)
            alone = ops.row_lse(x.q, x.k, x.mask, key_valid=x.key_valid, impl="triton")
    else:
        from dit_sparse.kernels.triton_attention import launch

        scale = case.dim**-0.5
        call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, scale)
        bare = ops.AttentionCall(x.q, x.k, None, x.mask, x.key_valid, scale)
        with poisoned_memory():
            found = launch(call, path)
            # The kernel for Hopper has no form without values.
            alone = launch(bare, "pointer" if path == "hopper" else path).lse

    q, k, v = (t.nan_to_num(0.0).transpose(1, 2) for t in (x.q, x.k, x.v))
    keep = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool, device=device)
    if x.mask is not None:
        keep = keep & x.mask.tokens()
    if x.key_valid is not None:
        keep = keep & x.key_valid[:, None, None]
    truth, truth_lse, _ = _exact(x)
    live = keep.any(-1)
    truth, mine = truth.transpose(1, 2)[live], found.out.transpose(1, 2)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)[live]
    scale = case.dim**-0.5
    eager = (scale * (q.float() @ k.float().mT)).masked_fill(~keep, float("-inf")).logsumexp(-1)
    size = float((scale * (q.float().abs() @ k.float().abs().mT)).max())
    lse_budget = 2 * (_worst(eager, truth_lse) + torch.finfo(torch.float32).eps * size)
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    out_budget = 2 * (_worst(theirs, truth) + torch.finfo(dtype).eps * largest)
    return [
        Finding("out", _worst(mine[live], truth), out_budget),
        Finding("empty rows", _worst(mine[~live], torch.zeros_like(mine[~live])), 0.0),
        Finding("lse", _worst(found.lse, truth_lse), lse_budget),
        Finding("row_lse", _worst(alone, truth_lse), lse_budget),
    ]


def _exact(x: Operands) -> ops.Attended:
    """The reference in fp64."""
    q, k, v = x.q.double(), x.k.double(), x.v.double()
    return ops.attention(q, k, v, x.mask, key_valid=x.key_valid, impl="reference")


def check_fp8(
    case: Case, dtype: torch.dtype, device: str, precision: str, path: str
) -> list[Finding]:
    """Errors of attention in 8 bits, beside those of its emulation.

    Args:
        case: What to compute.
        dtype: Dtype of the inputs, 16 bits.
        device: Where.
        precision: One of :data:`dit_sparse.kernels.ops.FP8`.
        path: ``"triton"``, or ``"hopper"`` for the kernel in Gluon.
    """
    x = build(case, dtype, device)
    call = ops.AttentionCall(
        x.q, x.k, x.v, x.mask, x.key_valid, case.dim**-0.5, precision=precision
    )
    wide = replace(call, q=x.q.double(), k=x.k.double(), v=x.v.double())
    truth, rounded = _exact(x), ReferenceFp8()(wide)
    with poisoned_memory():
        found = triton_fp8.launch(call) if path == "triton" else triton_fp8.launch_hopper(call)
    live = truth.lse.transpose(1, 2).isfinite()
    rounding = torch.finfo(dtype).eps * float(truth.out.abs().max())
    norms = [t.float().nan_to_num().norm(dim=-1).max() for t in (x.q, x.k)]
    size = case.dim**-0.5 * float(norms[0] * norms[1])
    budgets = {
        # Not the distance to the emulation: ties round either way, and tensor cores accumulate
        # products of 8 bits with fewer bits than fp32 has.
        "out": 2 * (_worst(rounded.out[live], truth.out[live]) + rounding),
        "lse": 2 * (_worst(rounded.lse, truth.lse) + torch.finfo(torch.float32).eps * size),
    }
    return [
        Finding("out", _worst(found.out[live], truth.out[live]), budgets["out"]),
        Finding("empty rows", _worst(found.out[~live], torch.zeros_like(found.out[~live])), 0.0),
        Finding("lse", _worst(found.lse, truth.lse), budgets["lse"]),
    ]


def _mass_call(case: Case, dtype: torch.dtype, device: str, stride: int = 1) -> ops.BlockMassCall:
    """Every key that is not padding takes part in block mass, so only those are NaN."""
    x = build(Case(**{**case.__dict__, "block": None}), dtype, device)
    q, k = x.q.double(), x.k.double()
    lse = ops.row_lse(q, k, key_valid=x.key_valid, impl="reference").float()
    lse[:, 0, : min(5, case.seq[0] - 1)] = float("-inf")
    rows, columns = case.block or (64, 64)
    every, block = slice(None, None, stride), (rows // stride, columns)
    return ops.BlockMassCall(
        x.q[:, every], x.k, lse[..., every], block, x.key_valid, case.dim**-0.5
    )


def check_block_mass(
    case: Case, dtype: torch.dtype, device: str, path: Path = "pointer", stride: int = 1
) -> list[Finding]:
    """Errors of block_mass of every ``stride``-th query by ``path`` of the Triton launcher."""
    x = _mass_call(case, dtype, device, stride)
    q, k, lse, block = x.q.double(), x.k.double(), x.lse, x.block
    with poisoned_memory():
        found = launch_block_mass(x, path)
    options = {"key_valid": x.key_valid, "impl": "reference"}
    truth = ops.block_mass(q, k, lse.double(), block, **options)
    eager = ops.block_mass(x.q.float(), x.k.float(), lse, block, **options)
    clean = x.k.float().nan_to_num(0.0).abs().transpose(1, 2)
    size = float((case.dim**-0.5 * (x.q.float().abs().transpose(1, 2) @ clean.mT)).max())
    # An error e of a score changes its weight by the factor 1 + e.
    rounding = torch.finfo(torch.float32).eps * (1 + size) * float(truth.max())
    return [Finding("mass", _worst(found, truth), 2 * (_worst(eager, truth) + rounding))]


def check_summary(case: Case, dtype: torch.dtype, device: str, path: str) -> list[Finding]:
    """Errors of attention that adds summaries of the blocks it skips; see `check_attention`."""
    x = build(case, dtype, device)
    assert x.mask is not None
    scale, columns = case.dim**-0.5, x.mask.shape[3]
    rng = torch.Generator().manual_seed(1)
    shape = (case.batch, columns, case.heads, case.dim)
    means = [torch.randn(shape, generator=rng).to(device, dtype) for _ in range(2)]
    count = torch.randint(0, x.mask.block[1] + 1, shape[:2], generator=rng).float().to(device)
    slope = torch.randn(case.batch, case.heads, case.dim, case.dim, generator=rng).to(device) / 8
    summary = BlockSummary(*means, count, slope)
    wide = BlockSummary(*(t.double() for t in means), count, slope.double())
    call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, scale, summary)
    with poisoned_memory():
        if path in ("triton", *OTHERS):
            found = ops.attention(
                x.q, x.k, x.v, x.mask, summary=summary, key_valid=x.key_valid, impl=path
            )
        else:
            from dit_sparse.kernels.triton_attention import launch

            found = launch(call, path)
    truth = ops.attention(
        x.q.double(), x.k.double(), x.v.double(), x.mask,
        summary=wide, key_valid=x.key_valid, impl="reference",
    )  # fmt: skip
    # The peer: torch's own attention with the means as more keys, and the slope added after.
    q, k, v = (t.nan_to_num(0.0).transpose(1, 2) for t in (x.q, x.k, x.v))
    key, value = (t.transpose(1, 2) for t in means)
    keep = x.mask.tokens()
    if x.key_valid is not None:
        keep = keep & x.key_valid[:, None, None]
    skipped = ~x.mask.dense().repeat_interleave(x.mask.block[0], 2)[:, :, : case.seq[0]]
    tail = count.log()[:, None, None].where(skipped, float("-inf"))
    zero = torch.zeros((), device=device)
    bias = torch.cat([zero.where(keep, float("-inf")).expand(*q.shape[:3], -1),
                      tail.expand(*q.shape[:3], -1)], -1)  # fmt: skip
    live = (bias > float("-inf")).any(-1)
    theirs = F.scaled_dot_product_attention(
        q, torch.cat([k, key], 2), torch.cat([v, value], 2), attn_mask=bias.to(dtype)
    )
    scores = scale * (q.float() @ torch.cat([k, key], 2).float().mT) + bias
    share = scores.softmax(-1)[..., k.shape[2] :].sum(-1, keepdim=True)
    theirs = theirs + (share * scale * (q.float() @ slope)).to(dtype)
    exact, mine = truth.out.transpose(1, 2), found.out.transpose(1, 2)
    out_budget = 2 * (
        _worst(theirs[live], exact[live]) + torch.finfo(dtype).eps * float(exact.abs().max())
    )
    size = float(scores.masked_fill(scores == float("-inf"), 0.0).abs().max())
    rounding = torch.finfo(torch.float32).eps * size
    findings = [
        Finding("out", _worst(mine[live], exact[live]), out_budget),
        Finding("empty rows", _worst(mine[~live], torch.zeros_like(mine[~live])), 0.0),
    ]
    for name, ours, wanted, peer in (
        ("lse", found.lse, truth.lse, scores.logsumexp(-1)),
        ("lse_kept", found.lse_kept, truth.lse_kept, scores[..., : k.shape[2]].logsumexp(-1)),
    ):
        findings.append(Finding(name, _worst(ours, wanted), 2 * (_worst(peer, wanted) + rounding)))
    return findings


def check_summarize(case: Case, dtype: torch.dtype, device: str) -> list[Finding]:
    """Errors of the summaries themselves."""
    block = case.block[1] if case.block else 64
    x = build(Case(**{**case.__dict__, "block": None}), dtype, device)
    blocks = max(1, block_count(case.seq[1], block) - 1)
    options = {"blocks": blocks, "first_order": True, "key_valid": x.key_valid}
    with poisoned_memory():
        found = ops.summarize(x.k, x.v, block, **options, impl="triton")
    truth = ops.summarize(x.k.double(), x.v.double(), block, **options, impl="reference")
    findings = [Finding("count", _worst(found.count, truth.count), 0.0)]
    single, eps = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    largest = {n: float(t.float().nan_to_num(0.0).abs().max()) for n, t in (("k", x.k), ("v", x.v))}
    # Means are summed in fp32 and rounded once to the dtype; the slope's centred keys are rounded
    # once, and each product is of order of the largest key times the largest value.
    budgets = {
        "key_mean": single * largest["k"] + eps * float(truth.key_mean.abs().max()),
        "value_mean": single * largest["v"] + eps * float(truth.value_mean.abs().max()),
        "slope": eps * largest["k"] * largest["v"],
    }
    for name, budget in budgets.items():
        error = _worst(getattr(found, name), getattr(truth, name))
        findings.append(Finding(name, error, 2 * budget))
    # What kernels multiply by is that slope, rounded once.
    read, wanted = found.slope_as(dtype), found.slope.to(dtype)
    findings.append(Finding("slope as read", _worst(read, wanted), 0.0))
    return findings


def check_top_blocks(case: Case, device: str) -> list[Finding]:
    """Differences of the selection from the reference: there may be none, ties included."""
    block = case.block or (64, 64)
    rows, columns = (block_count(n, b) for n, b in zip(case.seq, block, strict=True))
    rng = torch.Generator().manual_seed(0)
    # Few distinct values, so that ties are everywhere.
    mass = torch.randint(0, 9, (case.batch, case.heads, rows, columns), generator=rng).float() / 8
    count = torch.randint(1, columns + 1, (case.batch, case.heads), generator=rng)
    findings = []
    for free in (None, max(1, columns - 1)):
        options = {"block": block, "seq": case.seq, "free": free}
        with poisoned_memory():
            found = ops.top_blocks(mass.to(device), count.to(device), **options, impl="triton")
        truth = ops.top_blocks(mass, count, **options, impl="reference")
        lists, wanted = expand(found.mask).to("cpu"), truth.mask.lists()
        findings += [
            Finding("bits", _worst(found.mask.bits.cpu(), truth.mask.bits), 0.0),
            Finding("lists", _worst(lists.dense().float(), wanted.dense().float()), 0.0),
            Finding("mass", _worst(found.kept_mass.cpu(), truth.kept_mass), 1e-6 * columns),
            Finding(
                "density", _worst(found.mask.head_density.cpu(), truth.mask.head_density), 1e-6
            ),
        ]
    return findings


def check_far_keys(device: str) -> list[Finding]:
    """Keys and values beyond 2**31 elements; about 9 GiB."""
    q_len, kv_len, heads, dim, block = 128, 440_000, 40, 128, 128
    columns = block_count(kv_len, block)
    rng = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(1, q_len, heads, dim, generator=rng, **options)
    k, v = torch.zeros(2, 1, kv_len, heads, dim, **options)
    near, far = slice(0, block), slice((columns - 1) * block, kv_len)
    for tensor in (k, v):
        tensor.fill_(float("nan"))
        for part in (near, far):
            tensor[:, part] = torch.randn(tensor[:, part].shape, generator=rng, **options)
    keep = torch.zeros(1, 1, 1, columns, dtype=torch.bool, device=device)
    keep[..., 0] = keep[..., -1] = True
    mask = BlockMask.from_dense(keep, block, (q_len, kv_len))
    found = ops.attention(q, k, v, mask, impl="triton")
    small_k, small_v = (torch.cat([t[:, near], t[:, far]], 1) for t in (k, v))
    return _compare_far(found, q, small_k, small_v)


def check_far_queries(device: str) -> list[Finding]:
    """Queries and outputs beyond 2**31 elements; about 9 GiB."""
    q_len, kv_len, heads, dim = 440_000, 192, 40, 128
    rng = torch.Generator(device).manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(1, q_len, heads, dim, generator=rng, **options)
    k = torch.randn(1, kv_len, heads, dim, generator=rng, **options)
    v = torch.randn(1, kv_len, heads, dim, generator=rng, **options)
    found = ops.attention(q, k, v, impl="triton")
    last = ops.Attended(found.out[:, -200:], found.lse[..., -200:])
    return _compare_far(last, q[:, -200:], k, v)


def _compare_far(found: ops.Attended, q: Tensor, k: Tensor, v: Tensor) -> list[Finding]:
    truth = ops.attention(q.double(), k.double(), v.double(), impl="reference")
    eager = ops.row_lse(q.float(), k.float(), impl="reference")
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    largest = float(truth.out.abs().max())
    budget = 2 * (_worst(theirs, truth.out) + torch.finfo(q.dtype).eps * largest)
    size = q.shape[-1] ** -0.5 * float(
        (heads_first[0].float().abs() @ heads_first[1].float().abs().mT).max()
    )
    rounding = torch.finfo(torch.float32).eps * size
    return [
        Finding("out", _worst(found.out, truth.out), budget),
        Finding("lse", _worst(found.lse, truth.lse), 2 * (_worst(eager, truth.lse) + rounding)),
    ]


def refusals(path: str, case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """Why ``case`` cannot take ``path``; empty if it can."""
    from dit_sparse.kernels.triton_attention import hopper_reasons, tma_reasons

    x = build(case, dtype, device)
    call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, 1.0)
    return {"tma": tma_reasons, "hopper": hopper_reasons}[path](call) if path != "pointer" else []


def fp8_refusals(
    path: str, case: Case, dtype: torch.dtype, device: str, precision: str
) -> list[str]:
    """Why ``case`` cannot take ``path`` of :func:`check_fp8`; empty if it can."""
    x = build(case, dtype, device)
    call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, 1.0, precision=precision)
    found = triton_fp8.TritonFp8().reasons(call)
    return found + (triton_fp8.hopper_reasons(call) if path == "hopper" else [])


def unsuited(name: str, case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """Why ``case`` is not for the implementation ``name`` of another project, on any device.

    That it is not installed is one reason; that it cannot be loaded or fails its own test is none.
    """
    if name not in {impl.name for impl in ops.implementations("attention")}:
        return [f"{name} is not installed"]
    x = build(case, dtype, device)
    call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, case.dim**-0.5)
    if name == "cudnn":
        dense = case.block is None and not case.padding
        return [] if dense and dtype != torch.float32 else ["cudnn is dense and 16-bit here"]
    return (flash3 if name == "flash-attn-3" else flash4).static_reasons(call)


def run(
    cases: tuple[Case, ...] = CASES + LARGE_CASES,
    full: bool = True,
    tma: bool = True,
    shard: tuple[int, int] = (0, 1),
    only: str | None = None,
) -> bool:
    """Prints one line for each check on the GPU.

    Args:
        cases: What to check in bf16.
        full: Also checks fp16, fp32 and offsets beyond 32 bits.
        tma: Also checks the TMA path, where a case can take it.
        shard: (i, n) checks the i-th of n equal shares, so that n processes compile in parallel.
        only: One of :data:`OTHERS`, to check that alone.

    Returns:
        Whether all passed.
    """
    good = True
    index, shards = shard

    def report(name: str, findings: list[Finding]) -> None:
        nonlocal good
        passed = all(f.passed for f in findings)
        good &= passed
        details = "  ".join(f"{f.quantity} {f.error:.1e} <= {f.budget:.1e}" for f in findings)
        print(f"{'ok  ' if passed else 'FAIL'} {name:48s} {details}", flush=True)

    def attempt(name: str, function, *arguments) -> None:
        nonlocal good
        try:
            report(name, function(*arguments))
        except Exception as error:  # the other cases are still wanted
            good = False
            print(f"FAIL {name:48s} {type(error).__name__}: {error}", flush=True)

    pairs = [(case, torch.bfloat16) for case in cases]
    if full:
        pairs += [(case, torch.float16) for case in CASES[3:6]]
        pairs += [(case, torch.float32) for case in CASES[:6]]
    for case, dtype in pairs[index::shards]:
        label = f"{case.name} {str(dtype).removeprefix('torch.')}"
        for name in (only,) if only else OTHERS:
            reasons = unsuited(name, case, dtype, "cuda")
            if reasons:
                print(f"-    {f'attention {name} {label}':48s} {reasons[0]}", flush=True)
                good &= only is None or "not installed" not in reasons[0]
                continue
            attempt(f"attention {name} {label}", check_attention, case, dtype, "cuda", name)
            if name == "flash-attn-4" and case.block is not None:
                attempt(f"summary {name} {label}", check_summary, case, dtype, "cuda", name)
        if only:
            continue
        for path in ("pointer", "tma", "hopper") if tma else ("pointer",):
            if refusals(path, case, dtype, "cuda"):
                continue
            attempt(f"attention {path} {label}", check_attention, case, dtype, "cuda", path)
            if case.block is not None:
                attempt(f"summary {path} {label}", check_summary, case, dtype, "cuda", path)
        for precision in ops.FP8 if dtype != torch.float32 and case.dim <= 128 else ():
            for path in ("triton", "hopper"):
                if not fp8_refusals(path, case, dtype, "cuda", precision):
                    name = f"attention {precision} {path} {label}"
                    attempt(name, check_fp8, case, dtype, "cuda", precision, path)
        for path, stride in itertools.product(("pointer", "hopper"), (1, 2, 4)):
            if path == "hopper" and (
                not tma or hopper_mass_reasons(_mass_call(case, dtype, "cuda", stride))
            ):
                continue
            name = f"block_mass {path} {label} stride {stride}"
            attempt(name, check_block_mass, case, dtype, "cuda", path, stride)
        if case.block is not None:
            attempt(f"summarize {label}", check_summarize, case, dtype, "cuda")
            attempt(f"top_blocks {label}", check_top_blocks, case, "cuda")
    if full and index == 0 and not only:
        attempt("attention triton keys past 2**31", check_far_keys, "cuda")
        attempt("attention triton queries past 2**31", check_far_queries, "cuda")
    return good


def in_processes(count: int, arguments: Sequence[str] = ()) -> bool:
    """Runs the command line in ``count`` processes, each of which checks a share.

    Most of a check is compiling, which a process does one kernel after the other.

    Args:
        count: How many.
        arguments: What each is given beside its share.

    Returns:
        Whether all passed.
    """
    command = [sys.executable, "-m", "benchmarks.check_kernels", *arguments, "--shard"]
    running = [
        subprocess.Popen(
            [*command, f"{i}/{count}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(count)
    ]
    for process in running:
        print(process.communicate()[0], end="", flush=True)
    return all(process.returncode == 0 for process in running)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; without one run the tests, which use triton's interpreter")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--no-tma", action="store_true", help="leave the TMA path out")
    parser.add_argument("--shard", default="0/1", help="I/N: check the I-th of N equal shares")
    parser.add_argument("--only", choices=OTHERS, help="check this implementation alone")
    parser.add_argument(
        "--benchmark", action="store_true", help="check what benchmarks.kernels times, in bf16"
    )
    parser.add_argument("--processes", type=int, help="check in so many processes, on all cases")
    options = parser.parse_args()
    if options.processes:
        given = {"--no-tma": options.no_tma, "--benchmark": options.benchmark}
        rest = [word for word, on in given.items() if on]
        rest += ["--only", options.only] if options.only else []
        sys.exit(0 if in_processes(options.processes, rest) else 1)
    part, total = (int(n) for n in options.shard.split("/"))
    passed = run(
        BENCHMARK_CASES if options.benchmark else CASES + LARGE_CASES,
        full=not options.benchmark,
        tma=not options.no_tma,
        shard=(part, total),
        only=options.only,
    )
    sys.exit(0 if passed else 1)
