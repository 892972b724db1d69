"""What only the CPU implementation promises: chunking, bounded scratch, blocks really skipped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dit_sparse.kernels import cpu, ops
from dit_sparse.mask import BlockMask


def problem(
    seed: int, seq: tuple[int, int], block: tuple[int, int], density: float, dim: int = 8
) -> tuple[Tensor, Tensor, Tensor, BlockMask, Tensor]:
    """fp64 operands for 2 batch elements of 2 heads, with unequal rows and some padding."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, n, 2, dim, generator=rng, dtype=torch.float64)
        for n in (seq[0], seq[1], seq[1])
    )
    blocks = [-(-n // b) for n, b in zip(seq, block, strict=True)]
    spread = torch.rand(2, 2, blocks[0], 1, generator=rng) * 2 * density
    keep = torch.rand(2, 2, *blocks, generator=rng) < spread
    valid = torch.rand(2, seq[1], generator=rng) < 0.9
    return q, k, v, BlockMask.from_dense(keep, block, seq), valid


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    seq=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    density=st.floats(0, 1),
    scratch=st.sampled_from([1, 4096, 6 << 20]),
    padding=st.booleans(),
)
def test_any_shape_and_any_scratch(
    seed: int,
    seq: tuple[int, int],
    block: tuple[int, int],
    density: float,
    scratch: int,
    padding: bool,
) -> None:
    q, k, v, mask, valid = problem(seed, seq, block, density)
    key_valid = valid if padding else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_SCRATCH", scratch)
        for pattern in (mask, None):
            exact = ops.attention(q, k, v, pattern, key_valid=key_valid, impl="reference")
            got = ops.attention(q, k, v, pattern, key_valid=key_valid, impl="cpu")
            lse = ops.row_lse(q, k, pattern, key_valid=key_valid, impl="cpu")
            torch.testing.assert_close(got.out, exact.out)
            torch.testing.assert_close(got.lse, exact.lse)
            torch.testing.assert_close(lse, exact.lse)
            mass = {
                name: ops.block_mass(q, k, exact.lse, block, key_valid=key_valid, impl=name)
                for name in ("reference", "cpu")
            }
            torch.testing.assert_close(mass["cpu"], mass["reference"])


def test_chunks_cover_rows_and_bound_scratch_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_SCRATCH", 1000)
    counts = sorted(torch.randint(1, 100, (300,)).tolist(), reverse=True)
    covered = 0
    for run, longest in cpu._chunks(counts, 10):
        part = counts[run]
        assert run.start == covered and longest == part[0]
        assert len(part) == 1 or len(part) * longest * 10 <= 1000
        assert part[-1] >= longest * 7 / 8
        covered = run.stop
    assert covered == len(counts)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_work_is_proportional_to_density(density: float) -> None:
    """Counts the multiplications of the score-only path; a dense pass would do all of them."""
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 320, 2, 16, generator=rng) for _ in range(2))
    kept = round(density * 20)
    order = torch.rand(1, 2, 20, 20, generator=rng).argsort(-1).argsort(-1)
    mask = BlockMask.from_dense(order < kept, 16, 320)
    with FlopCounterMode(display=False) as counter:
        ops.row_lse(q, k, mask, impl="cpu")
    assert counter.get_total_flops() == 2 * 2 * 320 * (kept * 16) * 16


def test_strided_last_dimension_and_expanded_mask() -> None:
    q, k, v, mask, _ = problem(0, (40, 40), (8, 8), 0.5)
    swapped = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    wide = BlockMask(
        mask.kv_num_blocks[:1, :1].expand(2, 2, -1),
        mask.kv_indices[:1, :1].expand(2, 2, -1, -1),
        mask.block,
        mask.seq,
    )
    for pattern in (None, mask, wide):
        exact = ops.attention(q, k, v, pattern, impl="reference")
        got = ops.attention(*swapped, pattern, impl="cpu")
        torch.testing.assert_close(got.out, exact.out)
        torch.testing.assert_close(got.lse, exact.lse)


def test_short_index_lists() -> None:
    """``max_blocks`` may be the largest count rather than the number of blocks, even 0."""
    q, k, v, mask, _ = problem(3, (40, 40), (8, 8), 0.3)
    for longest in (int(mask.kv_num_blocks.max()), 0):
        short = BlockMask(
            mask.kv_num_blocks.clamp(max=longest),
            mask.kv_indices[..., :longest],
            mask.block,
            mask.seq,
        )
        exact = ops.attention(q, k, v, short, impl="reference")
        got = ops.attention(q, k, v, short, impl="cpu")
        torch.testing.assert_close(got.out, exact.out)
        torch.testing.assert_close(got.lse, exact.lse)


def test_no_tokens() -> None:
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 0, 2, 8)
    got = ops.attention(q, k, k, impl="cpu")
    assert (got.out == 0).all() and (got.lse == float("-inf")).all()
    got = ops.attention(k, q, q, impl="cpu")
    assert got.out.shape == (1, 0, 2, 8) and got.lse.shape == (1, 2, 0)
    assert ops.block_mass(q, k, torch.zeros(1, 2, 4), 4, impl="cpu").shape == (1, 2, 1, 0)


def test_refuses_to_drop_gradients() -> None:
    q, k, v, mask, _ = problem(0, (40, 40), (8, 8), 0.5)
    q.requires_grad_()
    with pytest.raises(ops.Unsupported, match="cpu: is forward only"):
        ops.attention(q, k, v, mask, impl="cpu")
    with torch.no_grad():
        ops.attention(q, k, v, mask, impl="cpu")


def test_operands_are_not_written() -> None:
    q, k, v, mask, valid = problem(0, (40, 40), (8, 8), 0.5)
    lse = ops.row_lse(q, k, impl="cpu")
    before = [x.clone() for x in (q, k, v, lse, mask.kv_indices)]
    ops.attention(q, k, v, mask, key_valid=valid, impl="cpu")
    ops.block_mass(q, k, lse, 8, key_valid=valid, impl="cpu")
    for x, y in zip((q, k, v, lse, mask.kv_indices), before, strict=True):
        assert torch.equal(x, y)
