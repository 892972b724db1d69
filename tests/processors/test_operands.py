"""Masks, padding, position ids and arranged operands, each by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import Draw
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dit_sparse.layout import TokenLayout
from dit_sparse.processors.masks import fold_weights, read_mask
from dit_sparse.processors.operands import Operands
from dit_sparse.processors.padding import attend_kept, kept_tokens
from dit_sparse.processors.positions import (
    image_grid,
    leading_video_grid,
    trailing_video_grid,
)

LAYOUT = TokenLayout((1, 2, 2), 3)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def operands(tokens: int = 7, queries: int | None = None, dim: int = 8) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((2, n, 3, dim) for n in (queries or tokens, tokens, tokens))
    return tuple(torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes)


class TestMasks:
    valid = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])

    def read(self, mask: Tensor | None, **options: bool) -> Tensor | None:
        reading = read_mask(mask, 2, LAYOUT, "layer", **options)
        assert reading.weights is None
        return reading.valid

    def test_padding_in_every_form(self) -> None:
        square = self.valid[:, None, None] & self.valid[:, None, :, None]
        penalty = (~self.valid).float()[:, None, None].expand(-1, 3, -1, -1) * -10000
        assert self.read(None) is None
        for found in (
            self.read(self.valid),
            self.read(self.valid[:, None, None]),
            self.read(self.valid[:, None, None].expand(-1, 3, 5, -1)),
            self.read(square, outer=True),
            self.read(square.expand(-1, 3, -1, -1), outer=True),
            self.read(penalty, penalty=True),
        ):
            assert found is not None
            assert torch.equal(found, self.valid)

    def test_a_mask_written_out_for_heads_and_queries_is_refused(self) -> None:
        with pytest.raises(NotImplementedError, match=r"padding mask.*\(2, 3, 5, 7\)"):
            self.read(self.valid[:, None, None].expand(-1, 3, 5, -1).contiguous())

    def test_one_mask_serves_the_batch(self) -> None:
        found = self.read(self.valid[1:, None, None])
        assert found is not None
        assert torch.equal(found, self.valid[1:].expand(2, -1))

    def test_padding_in_front_of_the_image(self) -> None:
        # The row of the first text token would say that only padding is seen.
        segments = torch.tensor([[-1, -1, 1, 1, 1, 1, 1]])
        mask = (segments[:, None] == segments[:, :, None])[:, None]
        layout = TokenLayout((1, 2, 2), 3, "text_video")
        found = read_mask(mask, 1, layout, "layer", outer=True).valid
        assert found is not None
        assert found.tolist() == [[False, False, True, True, True, True, True]]

    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(2, 1, 7, 7, dtype=torch.bool),
            torch.zeros(2, 1, 1, 7),
            torch.ones(2, 3, 1, 7, dtype=torch.bool),
            torch.ones(2, 1, 1, 4, dtype=torch.bool),
            torch.ones(2, 7),
        ],
        ids=["square", "float", "heads", "length", "float-2d"],
    )
    def test_other_masks_are_refused(self, mask: Tensor) -> None:
        with pytest.raises(NotImplementedError, match="layer: sparse attention takes a padding"):
            self.read(mask)

    @pytest.mark.parametrize("dim", [8, 12, 128])
    def test_folded_weights_add_their_product_to_the_scores(self, dim: int) -> None:
        q, k, v = operands(dim=dim)
        weights = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        bias = weights[:, None, :, None] * weights[:, None, None]
        wide = fold_weights(q, k, v, weights, dim**-0.5)
        assert all(x.shape[-1] % 8 == 0 for x in wide)
        query, key, value = (x.transpose(1, 2) for x in wide)
        out = scaled_dot_product_attention(query, key, value, scale=dim**-0.5)
        expected = dense(q, k, v, bias)
        assert (out.transpose(1, 2)[..., :dim] - expected).abs().max() < 1e-12


class TestPadding:
    def test_kept_tokens_are_a_slice_where_they_come_first(self) -> None:
        valid = torch.tensor([[True, True, False], [True, False, True], [True] * 3])
        first, second, third = kept_tokens(valid)
        assert (first, third) == (slice(0, 2), slice(0, 3))
        assert isinstance(second, Tensor)
        assert second.tolist() == [0, 2]

    @pytest.mark.parametrize(
        "valid",
        [
            [[True] * 5 + [False] * 2] * 2,
            [[True] * 5 + [False] * 2, [True] * 7],
            [[False, True] * 3 + [True], [True] * 6 + [False]],
        ],
        ids=["even", "uneven", "holes"],
    )
    def test_kept_rows_see_the_kept_keys_and_the_others_are_zero(
        self, valid: list[list[bool]]
    ) -> None:
        mask = torch.tensor(valid)
        q, k, v = operands()
        expected = dense(q, k, v, mask[:, None, None])
        k = k.masked_fill(~mask[..., None, None], float("nan"))
        out = attend_kept(dense, q, k, v, kept_tokens(mask))
        assert (out - expected)[mask].abs().max() < 1e-12
        assert not out[~mask].any()

    def test_queries_of_their_own_are_all_kept(self) -> None:
        mask = torch.tensor([[False] + [True] * 6, [True] * 7])
        q, k, v = operands(queries=4)
        out = attend_kept(dense, q, k, v, kept_tokens(mask))
        assert (out - dense(q, k, v, mask[:, None, None])).abs().max() < 1e-12

    def test_an_even_batch_takes_one_call(self) -> None:
        sizes: list[int] = []

        def count(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sizes.append(len(q))
            return dense(q, k, v)

        q, k, v = operands()
        attend_kept(count, q, k, v, [slice(0, 5), slice(0, 5)])
        attend_kept(count, q, k, v, [slice(0, 5), slice(0, 6)])
        assert sizes == [2, 1, 1]


class TestPositions:
    @pytest.mark.parametrize("grid", [(1, 3, 5), (1, 5, 3), (1, 1, 4), (1, 4, 1), (1, 1, 1)])
    def test_the_first_image(self, grid: tuple[int, int, int]) -> None:
        ids, reference = Draw().ids(grid), Draw().ids((1, 2, 2), first=1)
        for rows in (ids, torch.cat([ids, reference]), ids * 0.5 + 7, ids.long()):
            assert image_grid(rows) == grid

    @pytest.mark.parametrize("grid", [(1, 3, 5), (4, 2, 3), (3, 3, 2), (2, 1, 1)])
    def test_the_last_video(self, grid: tuple[int, int, int]) -> None:
        ids = Draw().ids(grid)
        # A frame of the same size whose time is later, and tokens at other places.
        frame = Draw().ids((1, *grid[1:]), first=9)
        text = torch.tensor([[float(i)] * 3 for i in range(4)]) + 100
        for rows in (ids, torch.cat([frame, ids]), torch.cat([text, ids])):
            assert trailing_video_grid(rows) == grid

    @pytest.mark.parametrize("grid", [(3, 3, 5), (4, 2, 3), (2, 1, 1)])
    def test_the_first_video(self, grid: tuple[int, int, int]) -> None:
        begin = Draw().ids(grid)
        spans = torch.stack([begin, begin + 1], -1) / 24
        # Begins within the last frame and not at its end.
        keyframe = torch.stack([begin, begin + 1], -1)[: grid[1] * grid[2]]
        keyframe[:, 0] += grid[0] - 0.5
        assert leading_video_grid(spans) == grid
        assert leading_video_grid(torch.cat([spans, keyframe / 24])) == grid

    @pytest.mark.parametrize("read", [image_grid, trailing_video_grid])
    def test_what_is_no_grid_is_refused(self, read: Callable[[Tensor], object]) -> None:
        ids = Draw().ids((1, 3, 4))
        ids[5, 2] += 1
        with pytest.raises(ValueError, match="not a row-major grid"):
            read(ids)
        with pytest.raises(ValueError, match="not a row-major grid"):
            read(Draw().ids((1, 3, 4))[1:-1])


class TestOperands:
    def test_queries_are_added_and_taken_away(self) -> None:
        q, k, v = operands(queries=4)
        made = Operands(q, k, v, LAYOUT, None, None).with_queries(2, 3)
        assert made.q.shape == k.shape
        assert not made.q[:, 2:5].any()
        assert (made.leave(dense(made.q, k, v)) - dense(q, k, v)).abs().max() < 1e-12
        assert torch.equal(made.leave(made.enter(q)), q)

    def test_rotation_brings_the_grid_to_the_front(self) -> None:
        q, k, v = operands()
        valid = torch.tensor([[True] * 7, [True] * 6 + [False]])
        made = Operands(q, k, v, LAYOUT, valid, None).rotated([3, 2])
        assert torch.equal(made.q[0, 0], q[0, 3])
        assert torch.equal(made.k[1, 0], k[1, 2])
        assert made.valid is not None
        assert made.valid[1].tolist() == [True] * 4 + [False] + [True] * 2
        out = made.leave(dense(made.q, made.k, made.v, made.valid[:, None, None]))
        assert (out - dense(q, k, v, valid[:, None, None])).abs().max() < 1e-12
        assert torch.equal(made.leave(made.enter(q)), q)

    def test_changes_are_undone_in_reverse(self) -> None:
        q, k, v = operands(queries=4)
        weights = torch.ones(2, 7, dtype=torch.float64)
        made = Operands(q, k, v, LAYOUT, None, None).with_queries(0, 3)
        made = made.with_weights(weights).rotated([3, 1])
        out = made.leave(dense(made.q, made.k, made.v * 1))
        assert out.shape == q.shape
        assert torch.equal(made.leave(made.enter(q)), q)
        assert made.enter_with_lse(q, q)[1] is None
        assert Operands(q, k, v, LAYOUT, None, None).enter_with_lse(q, q) == (q, q)
