"""Kernels of other projects against the fp64 reference, and the second pass that adds summaries."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import check_kernels as check
from dit_sparse.kernels import flash4_attention, ops
from dit_sparse.kernels.flash4_attention import skipped_part
from dit_sparse.kernels.ops import AttentionCall
from dit_sparse.kernels.probe import ShapeClass, disagreement
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.kernels.triton_merge import merge_into
from dit_sparse.mask import BlockMask

CASES = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in check.OTHERS
    for case in check.CASES + check.LARGE_CASES
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "case"), CASES)
def test_against_the_reference(name: str, case: check.Case) -> None:
    reasons = check.unsuited(name, case, torch.bfloat16, "cuda")
    if reasons:
        pytest.skip(reasons[0])
    findings = check.check_attention(case, torch.bfloat16, "cuda", name)
    if name == "flash-attn-4" and case.block is not None:
        findings += check.check_summary(case, torch.bfloat16, "cuda", name)
    assert all(finding.passed for finding in findings), findings


class Lists(NamedTuple):
    """The tensors of FlashAttention-4's block sparsity, under its names."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    return_lse: bool,
    block_sparse_tensors: Lists | None = None,
    mask_mod: str | None = None,
    aux_tensors: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What FlashAttention-4's function does with these arguments, for 2 batch elements and heads.

    Like the kernel it multiplies whole tiles: a weight of 0 meets every value of a visited block.
    """
    assert return_lse and (mask_mod is None) == (aux_tensors is None)
    batch, q_len, heads, _ = q.shape
    out, lse = torch.zeros_like(q), q.new_full((batch, heads, q_len), -math.inf).float()
    for b in range(batch):
        for h in range(heads):
            scores = softmax_scale * (q[b, :, h].float() @ k[b, :, h].float().T)
            visited = torch.ones_like(scores, dtype=torch.bool)
            seen = visited.clone()
            if block_sparse_tensors is not None:
                x = block_sparse_tensors
                visited[:], seen[:] = False, False
                for row in range(x.full_block_cnt.shape[2]):
                    rows = slice(row * x.block_size[0], (row + 1) * x.block_size[0])
                    for cnt, idx, partial in ((*x[:2], True), (*x[2:4], False)):
                        for column in idx[b, h, row, : cnt[b, h, row]].tolist():
                            keys = slice(column * x.block_size[1], (column + 1) * x.block_size[1])
                            visited[rows, keys] = seen[rows, keys] = True
                            if partial:
                                assert mask_mod == "existing" and aux_tensors is not None
                                seen[rows, keys] = aux_tensors[0][b, keys] == 1
            scores = scores.masked_fill(~seen, -math.inf)
            lse[b, h] = scores.logsumexp(-1)
            weights = scores.softmax(-1).masked_fill(~seen, 0.0)
            for i in range(q_len):
                out[b, i, h] = (weights[i, visited[i]] @ v[b, visited[i], h].float()).to(q.dtype)
    return out, lse


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shared", [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("block", [None, (64, 64), (64, 128), (256, 128)], ids=str)
def test_what_flash4_is_given(
    block: tuple[int, int] | None,
    shared: tuple[bool, bool],
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = flash4_attention._Library(stand_in, Lists, "existing")
    monkeypatch.setattr(flash4_attention, "_library", lambda: library)
    shared = shared if block else (False, False)
    kind = ShapeClass(torch.device("cpu"), torch.float16, 40, block, shared, padded)
    assert disagreement(flash4_attention._attend, kind) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 40])
def test_merging_in_place(dim: int, dtype: torch.dtype, device: str) -> None:
    rng = torch.Generator().manual_seed(0)
    parts = []
    for empty in (slice(0, 40), slice(30, 45)):
        out = torch.randn(2, 45, 3, dim, generator=rng)
        lse = 3 * torch.randn(2, 3, 45, generator=rng)
        lse[:, 1, empty] = float("-inf")
        out.transpose(1, 2)[lse == float("-inf")] = 0
        parts.append(ops.Attended(out.to(device, dtype), lse.to(device)))
    wide = [ops.Attended(part.out.double(), part.lse.double()) for part in parts]
    truth = ops.merge(*wide)
    found = merge_into(*parts)
    assert found.out.data_ptr() == parts[0].out.data_ptr()
    assert torch.equal(found.lse == float("-inf"), truth.lse == float("-inf"))
    # One rounding to the dtype of values up to 5, and a few of fp32.
    atol = 5 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found.out.double(), truth.out, rtol=0, atol=atol)
    torch.testing.assert_close(found.lse.double(), truth.lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("shape", [(2, 2), (1, 1)], ids=str)
def test_kept_and_skipped_parts_merge_to_one_softmax(
    shape: tuple[int, int], first_order: bool, device: str
) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, 2, 32, generator=rng).to(device) for _ in range(3))
    keep = torch.rand(*shape, 3, 3, generator=rng) < 0.5
    keep[:, 0, 0], keep[:, -1, 1] = False, True  # only summaries, and none
    mask = BlockMask.from_dense(keep.to(device), 64, 150)
    made = ops.summarize(k, v, 64, first_order=first_order, impl="reference")
    slope = None if made.slope is None else made.slope.double()
    wide = BlockSummary(made.key_mean.double(), made.value_mean.double(), made.count, slope)
    truth = ops.attention(q.double(), k.double(), v.double(), mask, summary=wide, impl="reference")
    kept = ops.attention(q, k, v, mask, impl="reference")
    part = skipped_part(AttentionCall(q, k, v, mask, None, 32**-0.5, made))
    full = mask.dense()[0, -1, 1]
    assert full.all() and (part.lse[0, -1, 64:128] == float("-inf")).all()
    whole = merge_into(kept, part)
    # fp32 products of 32 terms: about 32 roundings of scores of size at most 5.
    torch.testing.assert_close(whole.out.double(), truth.out, rtol=0, atol=2e-5)
    torch.testing.assert_close(whole.lse.double(), truth.lse.double(), rtol=0, atol=2e-5)
    without = ops.attention(q, k, v, mask, impl="reference")
    assert float((without.out - whole.out).abs().max()) > 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks all kernels where there is a GPU")
def test_shares_that_fail_fail_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert not check.in_processes(2, ["--benchmark"])
    assert capsys.readouterr().out.count("needs a CUDA device") == 2
