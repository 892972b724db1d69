"""Summaries of skipped blocks: what they must satisfy whatever computes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.kernels import ops
from dit_sparse.kernels.summary import BlockSummary
from dit_sparse.mask import BlockMask, block_count

NAMES = ("reference", "cpu")


def operands(
    seq: tuple[int, int] = (50, 70), batch: int = 2, heads: int = 3, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    lengths = (seq[0], seq[1], seq[1])
    q, k, v = (
        torch.randn(batch, n, heads, dim, generator=rng, dtype=torch.float64) for n in lengths
    )
    return 2 * q, k, v


def random_mask(seq: tuple[int, int], block: tuple[int, int], seed: int, heads: int) -> BlockMask:
    rng = torch.Generator().manual_seed(seed)
    shape = (1, heads, block_count(seq[0], block[0]), block_count(seq[1], block[1]))
    return BlockMask.from_dense(torch.rand(shape, generator=rng) < 0.4, block, seq)


@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name: str) -> None:
    """Against the softmax with weights n_j written out, one query at a time."""
    q, k, v = operands(heads=1, batch=1)
    mask = random_mask((50, 70), (16, 16), 1, 1)
    summary = ops.summarize(k, v, 16, first_order=True, impl=name)
    found = ops.attention(q, k, v, mask, summary=summary, scale=0.3, impl=name)
    assert summary.slope is not None and found.lse_kept is not None
    keep = mask.dense()[0, 0]
    for i in (0, 17, 49):
        numerator, denominator, skipped = torch.zeros(8).double(), 0.0, 0.0
        for j in range(5):
            keys, values = k[0, 16 * j : 16 * j + 16, 0], v[0, 16 * j : 16 * j + 16, 0]
            if keep[i // 16, j]:
                weight = (0.3 * keys @ q[0, i, 0]).exp()
                numerator += weight @ values
                denominator += float(weight.sum())
            else:
                weight = len(keys) * (0.3 * keys.mean(0) @ q[0, i, 0]).exp()
                numerator += weight * values.mean(0)
                skipped += float(weight)
        total = denominator + skipped
        slope = sum(
            (k[0, s, 0] - k[0, s, 0].mean(0)).T @ v[0, s, 0]
            for s in (slice(16 * j, 16 * j + 16) for j in range(5))
        )
        expected = numerator / total + skipped / total * 0.3 * (q[0, i, 0] @ slope) / 70
        torch.testing.assert_close(found.out[0, i, 0], expected)
        torch.testing.assert_close(found.lse[0, 0, i].exp(), torch.tensor(total).double())
        torch.testing.assert_close(
            found.lse_kept[0, 0, i].exp(), torch.tensor(denominator).double()
        )


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**16),
    st.booleans(),
    st.booleans(),
)
def test_cpu_is_reference(
    seq: tuple[int, int], block: tuple[int, int], seed: int, padded: bool, first_order: bool
) -> None:
    q, k, v = operands(seq, seed=seed)
    key_valid = None
    if padded:
        key_valid = torch.rand(2, seq[1], generator=torch.Generator().manual_seed(seed)) < 0.6
        k[~key_valid], v[~key_valid] = float("nan"), float("nan")
    mask = random_mask(seq, block, seed, 3)
    blocks = seed % (mask.shape[3] + 1)
    made, out = [], []
    for name in NAMES:
        made.append(
            ops.summarize(
                k, v, block[1], blocks=blocks, first_order=first_order, key_valid=key_valid,
                impl=name,
            )
        )  # fmt: skip
        out.append(ops.attention(q, k, v, mask, summary=made[0], key_valid=key_valid, impl=name))
    for field in ("key_mean", "value_mean", "count", "slope"):
        ours, theirs = (getattr(m, field) for m in made)
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(*out, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert made[0].count[:, blocks:].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first_order", [False, True])
def test_keys_constant_in_their_blocks_give_dense_attention(name: str, first_order: bool) -> None:
    q, k, v = operands()
    centres = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    k = centres.repeat_interleave(16, 1)[:, :70]
    mask = random_mask((50, 70), (16, 16), 2, 3)
    summary = ops.summarize(k, v, 16, first_order=first_order, impl=name)
    found = ops.attention(q, k, v, mask, summary=summary, impl=name)
    dense = ops.attention(q, k, v, impl=name)
    torch.testing.assert_close(found.out, dense.out)
    torch.testing.assert_close(found.lse, dense.lse)


@pytest.mark.parametrize("name", NAMES)
def test_the_denominator_never_exceeds_the_dense_one(name: str) -> None:
    q, k, v = operands()
    summary = ops.summarize(k, v, 16, impl=name)
    dense = ops.attention(q, k, v, impl=name)
    for seed in range(3):
        mask = random_mask((50, 70), (16, 16), seed, 3)
        found = ops.attention(q, k, v, mask, summary=summary, impl=name)
        assert found.lse_kept is not None
        assert (found.lse <= dense.lse + 1e-12).all()
        assert (found.lse_kept <= found.lse + 1e-12).all()
    full = BlockMask.full(16, (50, 70))
    found = ops.attention(q, k, v, full, summary=summary, impl=name)
    for lse in (found.lse, found.lse_kept):
        torch.testing.assert_close(lse, dense.lse)
    torch.testing.assert_close(found.out, dense.out)


def test_the_slope_raises_the_order_of_the_error() -> None:
    """Halving how far keys lie from their mean quarters the error with it, halves it without."""
    q, k, v = operands((20, 16), heads=1)
    nothing = BlockMask.from_dense(torch.zeros(1, 1, 2, 1, dtype=torch.bool), 16, (20, 16))
    mean, errors = k.mean(1, keepdim=True), {}
    for first_order in (False, True):
        for part in (0.02, 0.01):
            keys = mean + part * (k - mean)
            summary = ops.summarize(keys, v, 16, first_order=first_order, impl="cpu")
            found = ops.attention(q, keys, v, nothing, summary=summary, impl="cpu").out
            dense = ops.attention(q, keys, v, impl="cpu").out
            errors[first_order, part] = float((found - dense).abs().max())
    assert errors[False, 0.02] / errors[False, 0.01] == pytest.approx(2, rel=0.1)
    assert errors[True, 0.02] / errors[True, 0.01] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("constant", ["k", "v"])
def test_the_slope_is_zero_where_nothing_varies(constant: str) -> None:
    _, k, v = operands()
    steady = torch.randn(2, 5, 3, 8, dtype=torch.float64).repeat_interleave(16, 1)[:, :70]
    k, v = (steady, v) if constant == "k" else (k, steady)
    slope = ops.summarize(k, v, 16, first_order=True, impl="cpu").slope
    assert slope is not None and slope.abs().max() < 1e-13


def test_errors() -> None:
    q, k, v = operands()
    mask = random_mask((50, 70), (16, 16), 0, 3)
    summary = ops.summarize(k, v, 16)
    with pytest.raises(ValueError, match="got a summary and no mask"):
        ops.attention(q, k, v, summary=summary)
    with pytest.raises(ValueError, match=r"key_mean must be \(2, 5, 3, 8\).*summarize\(k, v, 16\)"):
        ops.attention(q, k, v, mask, summary=ops.summarize(k, v, 32))
    with pytest.raises(ValueError, match=r"count must be \(2, 5\)"):
        wrong = BlockSummary(summary.key_mean, summary.value_mean, summary.count[:, :4])
        ops.attention(q, k, v, mask, summary=wrong)
    with pytest.raises(ValueError, match=r"blocks must be in 0\.\.5 for 70 keys, got 6"):
        ops.summarize(k, v, 16, blocks=6)
    with pytest.raises(ValueError, match="at least 1 token"):
        ops.summarize(k, v, 0)
