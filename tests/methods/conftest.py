"""Small attention calls, and dense attention written down plainly to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse.layout import Ordering, TokenLayout
from dit_sparse.mask import PackedMask
from dit_sparse.methods.base import Call
from dit_sparse.schedule import Step


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Operands:
    """Queries, keys and values of one layer, and what their tokens are."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TokenLayout
    key_valid: Tensor | None = None

    def softmax(self, keep: Tensor | None = None) -> Tensor:
        """Attention weights ``[batch, heads, tokens, tokens]`` over valid (and kept) pairs."""
        k = self.k
        if self.key_valid is not None:
            k = k.masked_fill(~self.key_valid[..., None, None], 0)
        scores = torch.einsum("bihd,bjhd->bhij", self.q, k) * k.shape[-1] ** -0.5
        if self.key_valid is not None:
            scores = scores.masked_fill(~self.key_valid[:, None, None], float("-inf"))
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        return scores.softmax(-1)

    def attention(self, keep: Tensor | None = None) -> Tensor:
        """``[batch, tokens, heads, dim]``."""
        v = self.v
        if self.key_valid is not None:
            v = v.masked_fill(~self.key_valid[..., None, None], 0)
        return torch.einsum("bhij,bjhd->bihd", self.softmax(keep), v)

    def call(self, index: int = 0, memory: dict[str, Any] | None = None, total: int = 50) -> Call:
        """The call of this layer at step ``index``."""
        return Call(
            self.q,
            self.k,
            self.v,
            self.layout,
            Step(index, total, index / total, "cond", 0),
            layer=0,
            layers=1,
            key_valid=self.key_valid,
            memory={} if memory is None else memory,
            scale=None,
            impl="auto",
            dense_attention=lambda with_lse: (self.attention(), None),
        )

    def heads(self, index: Tensor) -> Operands:
        """The same with the heads ``index``."""
        q, k, v = (x[:, :, index] for x in (self.q, self.k, self.v))
        return Operands(q, k, v, self.layout, self.key_valid)

    def kept(self, mask: PackedMask, tile: tuple[int, int, int] | None) -> Tensor:
        """The pairs that ``mask`` keeps, tokens in the model's order."""
        tile = tile or (1, 1, self.layout.grid[2])
        inverse = self.layout.ordering(tile).inverse
        return mask.lists().tokens()[..., inverse, :][..., inverse]


Make = Callable[..., Operands]


@pytest.fixture
def make() -> Make:
    """Random operands; ``sharp`` scales the queries, so that attention concentrates."""

    def build(
        grid: tuple[int, int, int] = (4, 8, 16),
        text: int = 0,
        order: str = "video_text",
        batch: int = 1,
        heads: int = 2,
        dim: int = 8,
        sharp: float = 3.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> Operands:
        layout = TokenLayout(grid, text, order)  # type: ignore[arg-type]
        rng = torch.Generator().manual_seed(seed)
        shape = (batch, layout.tokens, heads, dim)
        q, k, v = (torch.randn(shape, generator=rng, dtype=dtype) for _ in range(3))
        return Operands(sharp * q, k, v, layout)

    return build


Plant = Callable[..., Operands]


@pytest.fixture
def plant(make: Make) -> Plant:
    """Operands whose attention is in the wanted blocks of 64 tokens and hardly anywhere else."""

    def build(wanted: Tensor, order: Ordering | None = None, grid: tuple = (4, 8, 16)) -> Operands:
        batch, heads, blocks, _ = wanted.shape
        data = make(grid=grid, heads=heads, dim=max(16, blocks), batch=batch)
        axes = torch.eye(data.q.shape[-1]).double()
        place = torch.arange(data.layout.video) // 64
        # Keys of a block share an axis; queries of a block point along the axes they want.
        k = axes[place][None, :, None].expand(batch, -1, heads, -1)
        q = 40 * (wanted.double() @ axes[:blocks])[:, :, place].transpose(1, 2)
        data.q, data.k = (x if order is None else order.undo(x) for x in (q, k))
        return data

    return build


class LargestOutput(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.fixture
def largest_output() -> LargestOutput:
    """A context whose ``numel`` tells the most elements of a tensor made inside it."""
    return LargestOutput()
