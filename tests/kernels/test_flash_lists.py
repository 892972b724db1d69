"""Block lists in FlashAttention-4's format, read back the way its kernel reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.flash4_lists import FlashLists, flash_lists
from dit_sparse.mask import BlockMask, PackedMask

BATCH, HEADS = 2, 3


def seen_by_kernel(
    lists: FlashLists, block: tuple[int, int], seq: tuple[int, int], key_valid: Tensor | None
) -> Tensor:
    """Pairs that the kernel computes, ``[batch, heads, q_len, kv_len]``.

    It cuts off what lies past the end of the keys only in the last entry of a list, and calls the
    function of the mask only in partial blocks.
    """
    width = -(-seq[1] // block[1]) * block[1]
    seen = torch.zeros(BATCH, HEADS, seq[0], width, dtype=torch.bool)
    for b in range(BATCH):
        for h in range(HEADS):
            for row in range(lists.full_counts.shape[2]):
                rows = slice(row * block[0], (row + 1) * block[0])
                for counts, indices, partial in (
                    (lists.mask_counts, lists.mask_indices, True),
                    (lists.full_counts, lists.full_indices, False),
                ):
                    count = int(counts[b, h, row])
                    for place, column in enumerate(indices[b, h, row, :count].tolist()):
                        end = (column + 1) * block[1]
                        if place == count - 1:
                            end = min(end, seq[1])
                        keys = torch.arange(column * block[1], end)
                        if partial:
                            assert key_valid is not None
                            keys = keys[key_valid[b, keys]]
                        assert not seen[b, h, rows][:, keys].any(), "a block is listed twice"
                        seen[b, h, rows, keys[:, None]] = True
    assert not seen[..., seq[1] :].any(), "keys past the end are computed"
    return seen[..., : seq[1]]


def random_mask(shape: tuple[int, int], block: tuple[int, int], seq: tuple[int, int]) -> BlockMask:
    rng = torch.Generator().manual_seed(0)
    blocks = [-(-n // size) for n, size in zip(seq, block, strict=True)]
    keep = torch.rand(*shape, *blocks, generator=rng) < 0.5
    keep[:, 0, 0] = False  # queries without keys
    keep[:, -1, -1] = True
    mask = BlockMask.from_dense(keep, block, seq)
    dead = torch.arange(blocks[1]) >= mask.kv_num_blocks.unsqueeze(-1)
    garbage = mask.kv_indices.masked_fill(dead, 1 << 30)
    return BlockMask(mask.kv_num_blocks, garbage, block, seq)


def padding(kv_len: int, block: int) -> Tensor:
    valid = torch.ones(BATCH, kv_len, dtype=torch.bool)
    valid[0, block + 3 :] = False  # whole blocks of padding, and one in part
    valid[1, kv_len // 2] = False
    valid[1, -1] = False  # the ragged block is partial
    return valid


@pytest.mark.parametrize("padded", [False, True], ids=["all-keys", "padded"])
@pytest.mark.parametrize("shape", [(BATCH, HEADS), (1, HEADS), (BATCH, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("block", "seq"),
    [((4, 4), (16, 16)), ((4, 4), (15, 18)), ((8, 4), (15, 18)), ((4, 8), (9, 21))],
    ids=str,
)
def test_the_kernel_sees_what_the_mask_keeps(
    block: tuple[int, int], seq: tuple[int, int], shape: tuple[int, int], padded: bool
) -> None:
    mask = random_mask(shape, block, seq)
    valid = padding(seq[1], block[1]) if padded else None
    lists = flash_lists(mask, BATCH, HEADS, valid)
    for counts, indices in (lists[:2], lists[2:]):
        assert counts.shape == (BATCH, HEADS, mask.shape[2])
        assert indices.shape[:3] == counts.shape and 1 <= indices.shape[3] <= mask.shape[3]
        assert counts.dtype == indices.dtype == torch.int32
        # Their layout marks this dimension as the contiguous one.
        assert counts.stride(-1) == indices.stride(-1) == 1
    wanted = mask.tokens().expand(BATCH, HEADS, *seq)
    if valid is not None:
        wanted = wanted & valid[:, None, None]
    assert torch.equal(seen_by_kernel(lists, block, seq, valid), wanted)


def test_only_blocks_with_padding_are_partial() -> None:
    seq, block = (16, 18), (4, 4)
    valid = padding(18, 4)
    lists = flash_lists(BlockMask.full(block, seq), BATCH, HEADS, valid)
    kept = [lists.full_indices[b, 0, 0, : lists.full_counts[b, 0, 0]].tolist() for b in (0, 1)]
    part = [lists.mask_indices[b, 0, 0, : lists.mask_counts[b, 0, 0]].tolist() for b in (0, 1)]
    assert kept == [[0], [0, 1, 3]]
    assert part == [[1], [2, 4]]
    valid[:] = True  # a ragged block without padding is a whole one, however it is said
    for told in (valid, None):
        ragged = flash_lists(BlockMask.full(block, seq), BATCH, HEADS, told)
        assert (ragged.mask_counts == 0).all() and (ragged.full_counts == 5).all()


def test_shared_lists_are_not_copied() -> None:
    mask = random_mask((1, 1), (4, 4), (16, 16))
    lists = flash_lists(mask, BATCH, HEADS, None)
    assert lists.full_indices.data_ptr() == mask.kv_indices.data_ptr()
    assert lists.full_indices.stride()[:2] == (0, 0)


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_read_back(padded: bool) -> None:
    """On the meta device there is nothing that could be read."""
    mask = random_mask((1, HEADS), (4, 4), (15, 18)).to("meta")
    valid = torch.ones(BATCH, 18, dtype=torch.bool, device="meta") if padded else None
    assert flash_lists(mask, BATCH, HEADS, valid).full_counts.is_meta


def test_packed_masks_go_through_their_lists() -> None:
    mask = random_mask((BATCH, HEADS), (4, 4), (15, 18))
    packed = PackedMask.from_dense(mask.dense(), (4, 4), (15, 18))
    lists = flash_lists(packed.lists(), BATCH, HEADS, None)
    wanted = mask.tokens()
    assert torch.equal(seen_by_kernel(lists, (4, 4), (15, 18), None), wanted)
