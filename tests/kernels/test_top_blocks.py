"""Row-wise selection of the key blocks of largest mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import ops
from dit_sparse.mask import block_count


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 20),
    st.integers(0, 8),
    st.integers(0, 2**16),
)
def test_cpu_is_reference(tokens: int, block: int, free: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    blocks = block_count(tokens, block)
    # Few distinct values: ties are everywhere.
    mass = torch.randint(0, 4, (2, 3, blocks, blocks), generator=rng).float()
    count = torch.randint(1, blocks + 2, (2, 3), generator=rng)
    found, exact = (
        ops.top_blocks(mass, count, block, tokens, free=free, impl=name)
        for name in ("cpu", "reference")
    )
    assert torch.equal(found.mask.bits, exact.mask.bits)
    assert torch.equal(found.kept_mass, exact.kept_mass)
    torch.testing.assert_close(found.mask.head_density, exact.mask.lists().head_density())


def test_rows_keep_their_largest_blocks_and_everything_past_the_free_ones() -> None:
    mass = torch.tensor([[[[3.0, 1, 2, 9], [1, 1, 1, 9], [0, 5, 4, 9], [0, 0, 0, 0]]]])
    count = torch.tensor([[2]])
    found = ops.top_blocks(mass, count, 4, 14, free=3, impl="cpu")
    assert found.mask.dense()[0, 0].int().tolist() == [
        [1, 0, 1, 1],
        [1, 1, 0, 1],  # equal masses: the first ones
        [0, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert found.kept_mass.tolist() == [[[5, 2, 9, 0]]]


def test_one_budget_serves_all_heads() -> None:
    mass = torch.rand(2, 3, 4, 4)
    found = ops.top_blocks(mass, torch.tensor([[1]]), 4, 16, longest=1, impl="cpu")
    assert found.mask.longest == 1
    assert torch.equal(found.mask.lists().kv_indices[..., 0].long(), mass.argmax(-1))


def test_errors() -> None:
    mass = torch.rand(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"mass must be \[batch, heads, 3, 3\]"):
        ops.top_blocks(mass, torch.ones(1, 2), 4, 12)
    with pytest.raises(ValueError, match=r"count must be \[batch, heads\] = \(1, 2\)"):
        ops.top_blocks(mass, torch.ones(1, 3), 4, 16)
