"""Kernels of other projects against the fp64 reference, and the second pass that adds summaries."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import check_kernels as check
from dit_sparse.kernels import ops
from dit_sparse.kernels.flash4_attention import skipped_part
from dit_sparse.kernels.ops import AttentionCall
from dit_sparse.kernels.summary import BlockSummary
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
    whole = ops.merge(kept, part)
    # fp32 products of 32 terms: about 32 roundings of scores of size at most 5.
    torch.testing.assert_close(whole.out.double(), truth.out, rtol=0, atol=2e-5)
    torch.testing.assert_close(whole.lse.double(), truth.lse.double(), rtol=0, atol=2e-5)
    without = ops.attention(q, k, v, mask, impl="reference")
    assert float((without.out - whole.out).abs().max()) > 0.1
