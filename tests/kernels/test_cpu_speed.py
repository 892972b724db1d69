"""The CPU implementation is faster than dense attention where it computes less."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.kernels import ops
from dit_sparse.mask import BlockMask

TOKENS, HEADS, DIM, BLOCK = 8192, 6, 64, 64


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["equal", "unequal"])
@pytest.mark.parametrize(("density", "speedup"), [(0.25, 2.0), (0.1, 4.0)])
def test_speedup(two_threads: None, density: float, speedup: float, rows: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM, generator=rng) for _ in range(3))
    blocks = TOKENS // BLOCK
    draw = torch.rand(1, HEADS, blocks, blocks, generator=rng)
    if rows == "equal":
        keep = draw.argsort(-1).argsort(-1) < round(density * blocks)
    else:
        keep = draw < torch.rand(1, HEADS, blocks, 1, generator=rng) * 2 * density
    mask = BlockMask.from_dense(keep, BLOCK, TOKENS)
    assert mask.density() == pytest.approx(density, rel=0.1)
    arms = {
        "dense": lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))),
        "sparse": lambda: ops.attention(q, k, v, mask, impl="cpu"),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(4):
        for name, arm in arms.items():
            times[name].append(seconds(arm))
    # The first round of each warms up.
    dense, sparse = (statistics.median(times[name][1:]) for name in ("dense", "sparse"))
    assert dense / sparse >= speedup
