"""The block mask: its two representations, its density and its algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from dit_sparse.mask import BlockMask, PackedMask, block_count, block_sizes


@st.composite
def masks(draw: st.DrawFn) -> tuple[torch.Tensor, BlockMask]:
    """A boolean matrix of blocks and the mask made from it."""
    seq = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    block = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (batch, heads, block_count(seq[0], block[0]), block_count(seq[1], block[1]))
    keep = torch.rand(shape, generator=rng) < draw(st.floats(0, 1))
    return keep, BlockMask.from_dense(keep, block, seq)


@settings(max_examples=60, deadline=None)
@given(masks())
def test_round_trip_and_density(made: tuple[torch.Tensor, BlockMask]) -> None:
    keep, mask = made
    assert mask.shape == tuple(keep.shape)
    assert torch.equal(mask.dense(), keep)
    tokens = mask.tokens()
    assert tokens.shape == (*keep.shape[:2], *mask.seq)
    exact = tokens.double().mean((-1, -2)).float()
    torch.testing.assert_close(mask.head_density(), exact)
    assert mask.density() == pytest.approx(float(tokens.double().mean()), abs=1e-6)
    assert torch.equal((~mask).tokens(), ~tokens)


@settings(max_examples=60, deadline=None)
@given(masks())
def test_packed_round_trip(made: tuple[torch.Tensor, BlockMask]) -> None:
    keep, mask = made
    packed = mask.pack()
    assert packed.shape == mask.shape
    assert packed.bits.shape[-1] == 4 * -(-keep.shape[-1] // 32)
    assert torch.equal(packed.dense(), keep)
    torch.testing.assert_close(packed.head_density, mask.head_density())
    longest = max(1, int(keep.sum(-1).max()))
    packed = PackedMask.from_dense(keep, mask.block, mask.seq, longest)
    lists = packed.lists()
    assert lists.kv_indices.shape[-1] == longest
    assert lists.bits is packed.bits
    assert torch.equal(lists.dense(), keep)


def test_bits_of_lists_are_packed_once() -> None:
    mask = BlockMask.from_dense(torch.rand(1, 2, 3, 40) < 0.5, 64, (192, 2560))
    assert mask.bits is None
    assert torch.equal(mask.packed_bits(), mask.pack().bits)
    assert mask.packed_bits() is mask.packed_bits() is mask.bits


def test_packed_bits_are_little_endian() -> None:
    keep = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
    keep[..., [0, 3, 9]] = True
    assert PackedMask.from_dense(keep, 4, (3, 40)).bits.flatten().tolist() == [0b1001, 2, 0, 0]


@settings(max_examples=30, deadline=None)
@given(masks(), st.integers(0, 2**16))
def test_algebra(made: tuple[torch.Tensor, BlockMask], seed: int) -> None:
    keep, mask = made
    rng = torch.Generator().manual_seed(seed)
    other_keep = torch.rand(1, 1, *keep.shape[2:], generator=rng) < 0.5
    other = BlockMask.from_dense(other_keep, mask.block, mask.seq)
    assert torch.equal((mask | other).dense(), keep | other_keep)
    assert torch.equal((mask & other).dense(), keep & other_keep)
    assert torch.equal((~mask).dense(), ~keep)
    assert (mask & ~mask).density() == 0
    assert (mask | ~mask).density() == 1


def test_lists_are_ascending_and_entries_past_the_count_are_ignored() -> None:
    keep = torch.tensor([[[[True, False, True], [False, False, False]]]])
    mask = BlockMask.from_dense(keep, 4, (7, 12))
    assert mask.kv_num_blocks.dtype == mask.kv_indices.dtype == torch.int32
    assert mask.kv_indices[0, 0, 0, :2].tolist() == [0, 2]
    indices = mask.kv_indices.clone()
    indices[0, 0, 0, 2:] = 2**31 - 1
    indices[0, 0, 1] = -(2**31)
    garbage = BlockMask(mask.kv_num_blocks, indices, mask.block, mask.seq)
    assert torch.equal(garbage.dense(), keep)


def test_ragged_block_sizes() -> None:
    assert block_count(10, 4) == 3
    assert block_sizes(10, 4).tolist() == [4, 4, 2]
    assert block_sizes(8, 4).tolist() == [4, 4]


def test_full() -> None:
    mask = BlockMask.full((4, 8), (10, 9))
    assert mask.shape == (1, 1, 3, 2)
    assert mask.density() == 1 and mask.tokens().all()
    assert mask.nbytes() == 4 * (3 + 3 * 2)
    assert mask.to("cpu").device.type == "cpu"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"bool tensor, got torch\.float32"):
        BlockMask.from_dense(torch.ones(1, 1, 2, 2), 4, 8)
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[batch, heads, 3, 3\].*got \(1, 1, 2, 2\)"):
        BlockMask.from_dense(keep, 4, 9)
    with pytest.raises(ValueError, match=r"q_blocks = 3.*got \(1, 1, 2\) and \(1, 1, 2, 2\)"):
        BlockMask(
            torch.zeros(1, 1, 2, dtype=torch.int32),
            torch.zeros(1, 1, 2, 2, dtype=torch.int32),
            (4, 4),
            (9, 9),
        )
    with pytest.raises(ValueError, match="same blocks and tokens"):
        BlockMask.full(4, 8) | BlockMask.full(8, 8)
    with pytest.raises(TypeError, match="ambiguous"):
        bool(BlockMask.full(4, 8))


def test_str_draws_the_pattern() -> None:
    keep = torch.eye(3, dtype=torch.bool)[None, None]
    lines = str(BlockMask.from_dense(keep, 4, 12)).splitlines()
    assert lines[0] == "BlockMask(batch=1, heads=1, seq=(12, 12), block=(4, 4), density=0.333)"
    assert lines[1:] == ["█  ", " █ ", "  █"]
    lines = str(BlockMask.full(1, (100, 200))).splitlines()
    assert len(lines) == 33 and set(lines[1:]) == {"█" * 64}


def test_to_flex() -> None:
    rng = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 3, 4, 5, generator=rng) < 0.5
    mask = BlockMask.from_dense(keep, (16, 8), (60, 37))
    flex = mask.to_flex()
    assert torch.equal(flex.to_dense().bool(), keep)
    assert flex.seq_lengths == mask.seq and mask.block == flex.BLOCK_SIZE

    tokens = mask.tokens()
    made = create_block_mask(
        lambda b, h, i, j: tokens[b, h, i, j], 2, 3, 60, 37, device="cpu", BLOCK_SIZE=(16, 8)
    )
    assert torch.equal(made.to_dense().bool(), keep)
