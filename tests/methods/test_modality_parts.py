"""Parts by modality, with an order a head, against masks of single pairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.mask import PackedMask
from dit_sparse.methods.mminference import MMInference
from dit_sparse.methods.modality_parts import (
    BOUNDARIES,
    Part,
    Parts,
    attend_parts,
    check_modalities,
    head_order,
    modality_ranges,
    parts_density,
)

# Frames of 8 x 10: reference frames 0 and 3, interleaved with the others; and frames 1 and 2 with
# the rest of the video left to itself. Text is on no list.
INTERLEAVED = (((0, 80), (240, 320)),)
THREE = (((0, 80),), ((80, 160), (240, 320)))


def random_parts(data: Any, method: MMInference, boundary: str, share: float, seed: int) -> Parts:
    """Parts with random orders and random blocks, text kept."""
    rng = torch.Generator().manual_seed(seed)
    parts = method.parts(data.call(), boundary)
    batch, _, heads, _ = data.q.shape
    found = {}
    for key, part in parts.items():
        keep = part.mask.dense()
        rows, columns = part.queries.blocks, part.keys.blocks
        keep[..., :rows, :columns] = torch.rand(batch, heads, rows, columns, generator=rng) < share
        mask = PackedMask.from_dense(keep, part.mask.block, part.mask.seq)
        order = torch.randint(len(part.queries.orders), (batch, heads), generator=rng)
        found[key] = replace(part, mask=mask, order=order)
    return found


def kept_pairs(data: Any, parts: Parts) -> Tensor:
    """How often each pair of tokens is computed, ``[batch, heads, tokens, tokens]``."""
    batch, tokens, heads, _ = data.q.shape
    times = torch.zeros(batch, heads, tokens, tokens, dtype=torch.int64)
    for part in parts.values():
        q_order, _ = head_order(part.queries, part.order, data.key_valid)
        k_order, _ = head_order(part.keys, part.order, data.key_valid)
        keep = part.mask.lists().tokens()
        mine = list(range(heads)) if part.heads is None else part.heads.tolist()
        for b in range(batch):
            for n, h in enumerate(mine):
                q, k = q_order.perm[b, n].long(), k_order.perm[b, n].long()
                times[b, h, q[:, None], k] += keep[b, n].long()
    return times


def attention(data: Any, keep: Tensor) -> Tensor:
    """Under a mask of pairs; 0 in rows without any."""
    rows = keep.any(-1).transpose(1, 2)[..., None]
    return data.attention(keep).where(rows, 0.0)


@pytest.mark.parametrize(
    ("modalities", "boundary"),
    [(None, "2d"), *[(m, b) for m in (INTERLEAVED, THREE) for b in BOUNDARIES]],
)
@pytest.mark.parametrize(
    ("text", "order"),
    [(0, "video_text"), (1, "video_text"), (70, "text_video"), (70, "video_text")],
)
def test_parts_are_attention_under_the_mask_of_their_pairs(
    make: Any, modalities: Any, boundary: str, text: int, order: str
) -> None:
    data = make(grid=(4, 8, 10), text=text, order=order, batch=2)
    method = MMInference(modalities=modalities, strides=("t", "w", "hw"), tile=(2, 4, 4))
    parts = random_parts(data, method, boundary, 0.6, seed=text)
    count = len(modality_ranges(modalities, data.layout))
    launches = {"none": 1, "q": count, "2d": count**2}[boundary]
    assert len(parts) == launches
    times = kept_pairs(data, parts)
    assert times.max() == 1
    is_text = data.layout.coords()[:, 0] < 0
    assert (times[..., is_text, :] == 1).all() and (times[..., is_text] == 1).all()
    keep = times.bool()
    out = attend_parts(data.call(), parts)
    assert (out - attention(data, keep)).abs().max() < 1e-12
    assert (out - data.attention()).abs().max() > 1e-3
    density = parts_density(parts, 2, data.layout.tokens)
    torch.testing.assert_close(density, keep.double().mean((-1, -2)).float())


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("text", [0, 9])
def test_all_blocks_are_all_pairs_once_in_any_order(make: Any, boundary: str, text: int) -> None:
    data = make(grid=(4, 8, 10), text=text, batch=2)
    parts = random_parts(data, MMInference(modalities=THREE), boundary, 1.1, seed=1)
    assert (kept_pairs(data, parts) == 1).all()
    assert (attend_parts(data.call(), parts) - data.attention()).abs().max() < 1e-12


def test_one_modality_is_the_pattern_itself(make: Any) -> None:
    data = make(grid=(4, 8, 10), text=5)
    every = (((0, 320),),)
    alone = MMInference(0.5, (0,)).parts(data.call(), "none")["none", 0, 0]
    for boundary in BOUNDARIES:
        # Video in one range, text in none: nothing is left for a second modality.
        parts = MMInference(0.5, (0,), modalities=every).parts(data.call(), boundary)
        assert list(parts) == [(boundary, 0, 0)]
        assert torch.equal(parts[boundary, 0, 0].mask.bits, alone.mask.bits)
        assert torch.equal(parts[boundary, 0, 0].order, alone.order)


def test_heads_of_different_boundaries_share_a_layer(make: Any) -> None:
    data = make(grid=(4, 8, 10), text=9, heads=5, batch=2)
    method = MMInference(modalities=INTERLEAVED)
    parts: dict[Any, Part] = {}
    for boundary, heads in (("none", (3,)), ("q", (0, 4)), ("2d", (1, 2))):
        found = random_parts(
            data.heads(torch.tensor(heads)), method, boundary, 0.5, seed=len(parts)
        )
        parts |= {key: replace(part, heads=torch.tensor(heads)) for key, part in found.items()}
    keep = kept_pairs(data, parts)
    assert keep.max() == 1
    out = attend_parts(data.call(), parts)
    assert (out - attention(data, keep.bool())).abs().max() < 1e-12
    density = parts_density(parts, 5, data.layout.tokens)
    torch.testing.assert_close(density, keep.double().mean((-1, -2)).float())


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("padded", [slice(325, None), slice(100, 140), slice(310, 324)])
def test_padded_keys_are_left_out_wherever_they_are(
    make: Any, boundary: str, padded: slice
) -> None:
    data = make(grid=(4, 8, 10), text=9, batch=2)
    data.key_valid = torch.ones(2, 329, dtype=torch.bool)
    data.key_valid[1, padded] = False
    data.k[1, padded] = data.v[1, padded] = float("nan")
    parts = random_parts(data, MMInference(modalities=INTERLEAVED), boundary, 0.7, seed=3)
    out = attend_parts(data.call(), parts)
    keep = kept_pairs(data, parts).bool()
    assert (out - attention(data, keep)).abs().max() < 1e-12


def test_ranges_of_modalities() -> None:
    layout = TokenLayout((4, 8, 10), 20, "text_video")
    assert modality_ranges(None, layout) == (None,)
    assert modality_ranges((), layout) == (None,)
    # The text comes first and belongs to none; the rest of the video is one more.
    found = modality_ranges((((0, 100),), ((180, 260),)), layout)
    assert found == (((0, 100),), ((180, 260),), ((100, 180), (260, 340)))
    # A modality of text alone is no modality.
    assert modality_ranges((((0, 20),), ((20, 340),)), layout) == (None,)
    with pytest.raises(ValueError, match="range to 341"):
        modality_ranges((((300, 341),),), layout)


@pytest.mark.parametrize(
    "wrong", [1, ((0, 5),), (((5, 5),),), (((-1, 5),),), (((0, 5.0),),), (((0, 9),), ((8, 12),))]
)
def test_impossible_modalities_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="modalities must"):
        check_modalities(wrong)
