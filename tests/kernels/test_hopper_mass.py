"""When block mass goes to the kernel for Hopper, and how that splits its work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from dit_sparse.kernels import triton_block_mass, triton_common
from dit_sparse.kernels.gluon import block_mass as gluon
from dit_sparse.kernels.ops import BlockMassCall


def call(dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> BlockMassCall:
    q = torch.zeros(1, 256, 2, dim, dtype=dtype)
    return BlockMassCall(q, q, torch.zeros(1, 2, 256), (128, 64), None, 1.0)


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """No numeric test: it needs the GPU."""
    monkeypatch.setattr(gluon, "mass_reasons", lambda *call: [])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (call(dtype=torch.float32), "bfloat16 and float16, got torch.float32"),
        (call(96), "head dims 64 and 128, got 96"),
        (replace(call(), k=call().k[:, :0]), "k is empty"),
        (replace(call(), q=call().q[:, :1].expand(-1, 256, -1, -1)), "q is not aligned"),
    ],
    ids=["dtype", "dim", "empty", "expanded"],
)
def test_it_says_why_it_refuses(bad: BlockMassCall, reason: str, untested: None) -> None:
    (found,) = gluon.reasons(bad)
    assert re.search(reason, found)
    assert gluon.reasons(call()) == gluon.reasons(call(64)) == []


def test_it_is_tested_before_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(name: str, run: object, x: BlockMassCall) -> list[str]:
        assert name == gluon.NAME and run is gluon.launch
        return ["failed the test"]

    monkeypatch.setattr(gluon, "mass_reasons", wrong)
    assert gluon.reasons(call()) == ["failed the test"]


def test_only_hopper_gets_it(monkeypatch: pytest.MonkeyPatch, untested: None) -> None:
    monkeypatch.setattr(triton_common, "INTERPRETED", True)
    assert triton_block_mass.hopper_reasons(call()) == ["Gluon has no interpreter"]
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    monkeypatch.setattr(triton_common, "capability", lambda tensor: (10, 0))
    assert triton_block_mass.hopper_reasons(call()) == ["needs compute capability 9.0"]
    monkeypatch.setattr(triton_common, "capability", lambda tensor: (9, 0))
    assert triton_block_mass.hopper_reasons(call()) == []

    paths = []
    monkeypatch.setattr(
        triton_block_mass, "launch", lambda x, path: paths.append(path) or torch.zeros(())
    )
    kernel = triton_block_mass.TritonBlockMass()
    result = kernel(call()), kernel(call(96))
    assert paths == ["hopper", "pointer"] and all(isinstance(x, Tensor) for x in result)


@pytest.mark.parametrize(("units", "k_tiles"), [(3072, 256), (6672, 139), (12, 256), (5, 3)])
def test_programs_end_together(units: int, k_tiles: int) -> None:
    programs = 132
    parts = gluon._parts(units, k_tiles, programs)
    assert parts == 1 or k_tiles // parts >= 2 * gluon.RING

    def longest(parts: int) -> int:
        return -(-units * parts // programs) * -(-k_tiles // parts)

    assert longest(parts) <= longest(1)
