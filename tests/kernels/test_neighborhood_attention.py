"""Neighborhood attention: every implementation, and the Triton kernel interpreted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import check_neighborhood as check
from dit_sparse.kernels import ops
from dit_sparse.kernels.ops import Attended, merge

GPU = torch.cuda.is_available()
# The interpreter has no bfloat16 matrix product.
HALF = torch.bfloat16 if GPU else torch.float16
CASES = [pytest.param(case, id=case.name) for case in check.CASES]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
LARGE = [pytest.param(case, id=case.name, marks=gpu) for case in check.LARGE_CASES]


def assert_passed(findings: list[check.Finding]) -> None:
    assert all(finding.passed for finding in findings), findings


def naive(x: check.Operands) -> Attended:
    """Softmax over the visible, valid pairs in fp64, with the matrix of all pairs."""
    q, k, v = (t.double().nan_to_num().transpose(1, 2) for t in (x.q, x.k, x.v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~x.keep, float("-inf"))
    out = scores.softmax(-1).nan_to_num(0.0) @ v
    return Attended(out.transpose(1, 2), scores.logsumexp(-1))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_is_softmax_over_the_visible_pairs(case: check.Case, impl: str) -> None:
    x = check.build(case, torch.float64, "cpu")
    exact = naive(x)
    found = ops.neighborhood_attention(x.q, x.k, x.v, x.mask, key_valid=x.key_valid, impl=impl)
    torch.testing.assert_close(found.out, exact.out)
    torch.testing.assert_close(found.lse, exact.lse)


def test_cases_cover_what_can_go_wrong() -> None:
    built = [check.build(case, torch.float32, "cpu") for case in check.CASES]
    assert any(x.mask.partial is None for x in built)
    assert any(x.mask.full is None for x in built)
    assert any(x.mask.full is not None and x.mask.partial is not None for x in built)
    assert {len(x.mask.place) for x in built} == {1, 2, 3}
    assert any(not x.keep.any(-1).all() for x in built), "no case has a query without a key"
    assert any(x.mask.video < x.q.shape[1] and x.mask.video % x.mask.block[1] for x in built), (
        "no case has a block of video and text"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_cpu(case: check.Case, dtype: torch.dtype) -> None:
    assert_passed(check.check(case, dtype, "cpu", "cpu"))


@pytest.mark.parametrize("case", CASES + LARGE)
def test_triton_half(case: check.Case, device: str) -> None:
    pytest.importorskip("triton")
    assert_passed(check.check(case, HALF, device, "triton"))


@pytest.mark.parametrize("case", [c for c in CASES if c.values[0].dim == 64 and c.id != "padding"])
def test_triton_fp32(case: check.Case, device: str) -> None:
    pytest.importorskip("triton")
    assert_passed(check.check(case, torch.float32, device, "triton"))


def test_every_tile_size_gives_the_same_result(device: str) -> None:
    pytest.importorskip("triton")
    from dit_sparse.kernels.triton_neighborhood import Config, launch

    case = dataclasses.replace(check.CASES[8], batch=1, padding=False)
    x = check.build(case, torch.float16, device)
    assert x.mask.partial is not None and x.mask.block == (128, 128)
    call = ops.NeighborhoodCall(x.q, x.k, x.v, x.mask, x.mask.partial, None, None, 0.125)
    results = [launch(call, Config(*tile, 4, 2)) for tile in ((128, 128), (64, 32), (32, 64))]
    rounding = 2 * torch.finfo(torch.float16).eps * float(results[0].out.abs().max())
    for other in results[1:]:
        torch.testing.assert_close(other.out, results[0].out, atol=rounding, rtol=0.0)
        torch.testing.assert_close(other.lse, results[0].lse)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_goes_on_with_what_was_seen(impl: str) -> None:
    """The partial blocks after other keys give the union of both, rows without either too."""
    if impl == "triton":
        pytest.importorskip("triton")
    x = check.build(check.CASES[0], torch.float32, "cpu")
    assert x.mask.partial is not None
    seen = ops.attention(x.q, x.k[:, :40], x.v[:, :40])
    seen.out[:, 3:9], seen.lse[:, :, 3:9] = 0.0, float("-inf")
    call = ops.NeighborhoodCall(x.q, x.k, x.v, x.mask, x.mask.partial, None, None, 0.125)
    alone = ops.select("neighborhood", call, "reference")(call)
    expected = merge(alone, seen)
    before = Attended(seen.out.clone(), seen.lse.clone())
    found = ops.select("neighborhood", call, impl)(dataclasses.replace(call, seen=before))
    torch.testing.assert_close(found.out, expected.out)
    torch.testing.assert_close(found.lse, expected.lse)


def test_a_block_sparse_mask_takes_the_attention_operator_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = check.build(check.CASES[2], torch.float32, "cpu")
    assert x.mask.partial is None
    monkeypatch.setattr(ops, "select", lambda op, *a: pytest.fail(op))
    calls: list[Any] = []
    monkeypatch.setattr(ops, "attention", lambda *a, **k: calls.append(a[3]))
    ops.neighborhood_attention(x.q, x.k, x.v, x.mask)
    assert calls == [x.mask.full]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_summaries_stand_for_blocks_that_are_not_visited(impl: str) -> None:
    case = check.Case("summary", (2, 8, 32), {"window": (1, 5, 7)}, (1, 8, 8), 9)
    x = check.build(case, torch.float64, "cpu")
    assert x.mask.partial is not None and x.mask.visited.density() < 0.7
    summary = ops.summarize(x.k, x.v, 64, blocks=8, first_order=True)
    found = ops.neighborhood_attention(x.q, x.k, x.v, x.mask, summary=summary, impl=impl)
    # Written out: visible keys, then one key for each block that the row's block does not visit.
    visited = x.mask.visited.dense()[0, 0].repeat_interleave(64, 0)[: x.q.shape[1], :8]
    scale, skipped = x.q.shape[-1] ** -0.5, ~visited
    for head in range(2):
        q, k, v = (t[0, :, head] for t in (x.q, x.k, x.v))
        exact = (scale * q @ k.T).masked_fill(~x.keep[0, 0], float("-inf"))
        means = scale * q @ summary.key_mean[0, :8, head].T + summary.count[0, :8].log()
        scores = torch.cat([exact, means.masked_fill(~skipped, float("-inf"))], 1)
        weights = scores.softmax(-1)
        out = weights @ torch.cat([v, summary.value_mean[0, :8, head]])
        share = weights[:, len(k) :].sum(-1, keepdim=True)
        assert summary.slope is not None
        out += share * scale * (q @ summary.slope[0, head])
        torch.testing.assert_close(found.out[0, :, head], out)
        torch.testing.assert_close(found.lse[0, head], scores.logsumexp(-1))
    kept = naive(x)
    torch.testing.assert_close(found.lse_kept, kept.lse)


def test_messages() -> None:
    x = check.build(check.CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="the mask was made for"):
        ops.neighborhood_attention(x.q[:, 1:], x.k[:, 1:], x.v[:, 1:], x.mask)
    with pytest.raises(ValueError, match="the mask is on meta"):
        ops.neighborhood_attention(x.q, x.k, x.v, x.mask.to("meta"))
    with pytest.raises(ValueError, match="impl must be"):
        ops.neighborhood_attention(x.q, x.k, x.v, x.mask, impl="fastest")
    pytest.importorskip("triton")
    with pytest.raises(ops.Unsupported, match="scale must be positive"):
        ops.neighborhood_attention(x.q, x.k, x.v, x.mask, scale=-1.0, impl="triton")
    with pytest.raises(ops.Unsupported, match="float64"):
        wide = [t.double() for t in (x.q, x.k, x.v)]
        ops.neighborhood_attention(*wide, x.mask, impl="triton")


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_interpreter_is_never_chosen_automatically() -> None:
    x = check.build(check.CASES[0], torch.float32, "cpu")
    assert x.mask.partial is not None
    call = ops.NeighborhoodCall(x.q, x.k, x.v, x.mask, x.mask.partial, None, None, 1.0)
    assert ops.select("neighborhood", call).name == "cpu"
