"""Residuals added and replaced, by Triton and by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.residual import Index, add_residual, replace_residual
from dit_sparse.layout import Ordering

ALL = slice(None)
EIGHT = torch.float8_e4m3fn
TOKENS = 37
PARTS = {
    "all": (ALL, ALL, ALL),
    "rows": (ALL, torch.tensor([1, 5, 7, 30, 36]), ALL),
    "heads": (ALL, ALL, slice(1, None, 2)),
}
KINDS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float32, EIGHT),
    (torch.float16, EIGHT),
]


def fused(dtype: torch.dtype = torch.float32, stored: torch.dtype = torch.float32) -> None:
    """Skips where Triton cannot run."""
    if stored == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter of triton cuts numbers off that it makes bfloat16")
    common = pytest.importorskip("dit_sparse.kernels.triton_common")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reasons := common.refusals(torch.empty(1, 1, 1, 8, dtype=dtype, device=device), None):
        pytest.skip("; ".join(reasons))


def random(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(device, dtype)


def kept(dtype: torch.dtype, dim: int, device: str) -> tuple[Tensor, Tensor | None]:
    values = torch.zeros(2, TOKENS, 3, dim, device=device).to(dtype)
    return values, torch.ones(2, TOKENS, 3, 1, device=device) if dtype == EIGHT else None


def on(device: str, index: Index) -> Index:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in index)


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize(("dtype", "stored"), KINDS, ids=str)
@pytest.mark.parametrize("factor", [False, True])
def test_triton_is_pytorch(
    part: str, dtype: torch.dtype, stored: torch.dtype, factor: bool, device: str
) -> None:
    fused(dtype, stored)
    index = on(device, PARTS[part])
    # Strided, as the parts of a fused projection are.
    dense = random(2, TOKENS, 3, 80, seed=0, dtype=dtype, device=device)[..., :40]
    sparse = random(2, TOKENS, 3, 40, seed=1, dtype=dtype, device=device)
    dense[0, 5] = sparse[0, 5]
    share = random(2, TOKENS, 3, 1, seed=2, dtype=torch.float32, device=device).sigmoid()
    by = share[index] if factor else None
    order = Ordering.from_perm(torch.randperm(TOKENS, device=device))
    found = {}
    for impl in ("reference", "triton"):
        values, scale = kept(stored, 40, device)
        replace_residual(values, scale, index, dense[index], sparse, factor=by, impl=impl)
        weight = share[:, :, :1] if factor else None
        whole = share if factor else None
        moved = add_residual(
            sparse.clone(), values, scale, factor=whole, weight=weight, order=order, impl=impl
        )
        plain = sparse.clone()
        assert add_residual(plain, values, scale, impl=impl) is plain
        bits = values.view(torch.uint8) if stored == EIGHT else values.float()
        found[impl] = [bits.float(), moved.float(), plain.float()]
        if scale is not None:
            found[impl].append(scale)
    # float8 bits are equal, the sums differ by the order of roundings.
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        tolerance = 2e-6 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    if stored == EIGHT and not factor:
        assert torch.equal(found["triton"][0], found["reference"][0])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_kept_brings_the_dense_output_back(impl: str, device: str) -> None:
    if impl == "triton":
        fused()
    dense, sparse = (
        random(2, TOKENS, 3, 16, seed=n, dtype=torch.float32, device=device) for n in range(2)
    )
    values, scale = kept(torch.float32, 16, device)
    index = on(device, PARTS["rows"])
    replace_residual(values, scale, index, dense[index], sparse, impl=impl)
    out = add_residual(sparse.clone(), values, impl=impl)
    expected = sparse.clone()
    expected[index] = dense[index]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    order = Ordering.from_perm(torch.randperm(TOKENS, device=device))
    back = add_residual(order.apply(sparse), order.apply(values), order=order, impl=impl)
    torch.testing.assert_close(back, out, rtol=1e-6, atol=1e-6)


def test_eight_bits_of_every_code_and_between(device: str) -> None:
    """Packing and unpacking agree with PyTorch's conversion for all codes and many fractions."""
    fused()
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    zeros = torch.zeros(1, len(codes), 1, 1, device=device)
    one = torch.ones_like(zeros)
    values = codes.view(EIGHT).view(1, -1, 1, 1)
    out = add_residual(zeros.clone(), values, one, impl="triton")
    assert torch.equal(out.flatten(), codes.view(EIGHT).float())
    grid = torch.linspace(-9, 8.8, 4001, device=device).exp2().clamp(max=448)
    dense = torch.stack([grid, grid.flip(0), -grid], -1).view(1, -1, 1, 3)
    # With 448 in every row the scale is 1.
    dense = torch.nn.functional.pad(dense, (0, 1), value=448.0)
    packed = torch.zeros(dense.shape, device=device).to(EIGHT)
    scale = torch.zeros(*dense.shape[:-1], 1, device=device)
    everything = (ALL, ALL, ALL)
    replace_residual(packed, scale, everything, dense, torch.zeros_like(dense), impl="triton")
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(packed.view(torch.uint8), dense.to(EIGHT).view(torch.uint8))
