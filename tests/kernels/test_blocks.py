"""Which blocks ``block="auto"`` stands for."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import blocks, triton_common
from dit_sparse.kernels.blocks import FEWEST_TOKENS, fastest_block


class OnCuda:
    """Queries that say they are on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, tokens: int, dim: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (1, tokens, 2, dim), dtype


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype", "capability", "wide"),
    [
        (FEWEST_TOKENS, 128, torch.bfloat16, (9, 0), True),
        (FEWEST_TOKENS, 128, torch.float16, (9, 0), True),
        (FEWEST_TOKENS - 1, 128, torch.bfloat16, (9, 0), False),
        (FEWEST_TOKENS, 64, torch.bfloat16, (9, 0), False),
        (FEWEST_TOKENS, 128, torch.float32, (9, 0), False),
        (FEWEST_TOKENS, 128, torch.bfloat16, (8, 9), False),
        (FEWEST_TOKENS, 128, torch.bfloat16, (10, 0), False),
    ],
)
def test_blocks_are_wide_where_the_kernel_for_hopper_takes_them(
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    wide: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "compute_capability", lambda device: capability)
    monkeypatch.setattr(triton_common, "gluon_module", lambda name: object())
    assert fastest_block(OnCuda(tokens, dim, dtype)) == ((128, 64) if wide else 64)  # type: ignore
    monkeypatch.setattr(triton_common, "gluon_module", lambda name: "this triton lacks it")
    assert fastest_block(OnCuda(tokens, dim, dtype)) == 64  # type: ignore[arg-type]


def test_a_cpu_has_no_such_kernel() -> None:
    assert fastest_block(torch.empty(1, FEWEST_TOKENS, 1, 128, dtype=torch.bfloat16)) == 64
