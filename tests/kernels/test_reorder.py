"""Tokens in another order."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import ops
from dit_sparse.kernels.triton_common import INTERPRETED
from dit_sparse.layout import Ordering

GPU = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
DEVICES = [pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=gpu)]


def operands(heads: int, dim: int, layout: str, device: str) -> list[torch.Tensor]:
    """Three tensors [2, 37, heads, dim] in one of the layouts that models use."""
    shape = (2, 37, heads, dim)
    if layout == "fused":
        fused = torch.randn(2, 37, 3, heads, dim, device=device, dtype=torch.float16)
        return [fused[:, :, i] for i in range(3)]
    if layout == "heads first":
        made = torch.randn(3, 2, heads, 37, dim, device=device, dtype=torch.float16)
        return [x.transpose(1, 2) for x in made]
    return [torch.randn(shape, device=device, dtype=torch.float16) for _ in range(3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["tokens first", "heads first", "fused"])
@pytest.mark.parametrize(("heads", "dim"), [(3, 40), (2, 64), (5, 16)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_token_of_every_tensor_moves(
    device: str, layout: str, heads: int, dim: int, count: int
) -> None:
    tensors = operands(heads, dim, layout, device)[:count]
    # Fewer and repeated tokens are allowed as well.
    index = torch.randint(0, 37, (31,), device=device)
    found = ops.reorder(index, *tensors, impl="triton")
    assert len(found) == count
    for moved, x in zip(found, tensors, strict=True):
        assert moved.is_contiguous()
        assert torch.equal(moved, x[:, index])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_an_ordering_on_a_gpu_is_undone() -> None:
    order = Ordering.from_perm(torch.randperm(37)).to("cuda")
    x = torch.randn(2, 37, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(order.apply(x), x[:, order.perm])
    assert torch.equal(order.undo(order.apply(x)), x)


def test_wrong_use_is_refused() -> None:
    x = torch.randn(1, 5, 2, 8)
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.reorder(torch.arange(5))
    with pytest.raises(ValueError, match=r"index must be \[tokens\] int64"):
        ops.reorder(torch.arange(5, dtype=torch.int32), x)
    ragged = [torch.randn(1, 5, 2, 8), torch.randn(1, 6, 2, 8)]
    with pytest.raises(ops.Unsupported, match="one shape and dtype"):
        ops.reorder(torch.arange(5), *ragged, impl="triton")
