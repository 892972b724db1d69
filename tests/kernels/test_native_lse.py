"""PyTorch's own kernel called for its LSE."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.kernels import ops
from dit_sparse.kernels.native_lse import native_attention_with_lse

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_same_output_and_the_right_lse(
    device: str, dtype: torch.dtype, scale: float | None
) -> None:
    q, k, v = (torch.randn(2, 70, 3, 16, dtype=dtype, device=device) for _ in range(3))
    found = native_attention_with_lse(q, k, v, scale)
    if device == "cuda" and dtype == torch.float32:
        assert found is None  # no flash kernel takes it
        return
    assert found is not None
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    assert torch.equal(found[0], theirs.transpose(1, 2))
    exact = ops.row_lse(q.double(), k.double(), scale=scale, impl="reference")
    assert found[1].shape == exact.shape
    # The kernel's scores are those of its dtype's inputs, accumulated in fp32.
    torch.testing.assert_close(found[1].double(), exact, atol=1e-4, rtol=1e-5)


def test_none_where_torch_would_take_another_kernel() -> None:
    q, k, v = (torch.randn(1, 20, 2, 10) for _ in range(3))
    assert native_attention_with_lse(q, k, v) is None
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert native_attention_with_lse(q, k, v) is None
