"""``attention_precision``: what is in 8 bits in a generation, and what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import enable_sparse_attention
from dit_sparse.bands import FULL, BandMask
from dit_sparse.config import SparseConfig
from dit_sparse.kernels import ops
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call
from dit_sparse.methods.residual_values import Residual
from dit_sparse.processors.checks import check_implementation

SETTINGS = {"sparsity": 0.5, "search": (2, 4)}
KERNELS = {"model": "cpu", "fp8_qk": "cpu fp8_qk", "fp8_qkpv": "reference fp8_qkpv"}


def test_sparse_steps_alone_are_rounded(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, dense = clip(), []
    original = Call.dense_with_lse

    def record(call: Call) -> ops.Attended:
        found = original(call)
        dense[-1].append(found.out.clone())
        return found

    monkeypatch.setattr(Call, "dense_with_lse", record)
    results = {}
    for precision, kernel in KERNELS.items():
        dense.append([])
        options = SETTINGS | {"attention_precision": precision}
        with enable_sparse_attention(run.pipe, "adaspa", **options) as sparse:
            results[precision] = run(steps=5)
            report = sparse.report()
        assert report.kernels == {"own": 8, kernel: 12}
        assert "attention by its rank" in report.choices[kernel]
        assert kernel in str(report)
    assert not torch.equal(results["model"], results["fp8_qk"])
    assert not torch.equal(results["fp8_qk"], results["fp8_qkpv"])
    # Until the first sparse step all is as without.
    assert torch.equal(dense[0][0], dense[1][0]) and torch.equal(dense[0][0], dense[2][0])


@pytest.mark.parametrize("method", ["compensated_delta", "rettention"])
def test_what_dense_steps_keep_is_not_rounded(
    clip: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = clip(), []
    original = Residual.between.__func__

    def record(kind: type[Residual], dense: Tensor, sparse: Tensor, *rest: Any, **options: Any):
        kept[-1].append(sparse.clone())
        return original(kind, dense, sparse, *rest, **options)

    monkeypatch.setattr(Residual, "between", classmethod(record))
    for precision in ("model", "fp8_qk"):
        kept.append([])
        with enable_sparse_attention(run.pipe, method, attention_precision=precision) as sparse:
            run(steps=6)
            assert ("cpu fp8_qk" in sparse.report().kernels) == (precision == "fp8_qk")
    # Those of the first dense step are computed from what nothing was rounded for.
    assert kept[0] and torch.equal(kept[0][0], kept[1][0])


@pytest.mark.parametrize("precision", ops.FP8)
def test_a_full_mask_is_near_dense(clip: Any, precision: str) -> None:
    run = clip()
    dense = run()
    with enable_sparse_attention(run.pipe, "full", attention_precision=precision):
        rounded = run()
    error = (rounded - dense).norm() / dense.norm()
    assert 0 < error < 2.0**-4


def test_what_has_no_form_in_8_bits_says_so(clip: Any, calls: list[Call]) -> None:
    run = clip()
    wanted = r"in the model's dtype only.*leave it at 'model'"
    with (
        enable_sparse_attention(run.pipe, "gna", attention_precision="fp8_qk"),
        pytest.raises(ops.Unsupported, match=wanted),
    ):
        run()
    with enable_sparse_attention(run.pipe, "adaspa", attention_precision="fp8_qk"):
        run(steps=1)
    call = calls[-1]
    bands = BandMask((FULL,) * call.q.shape[2], 64, call.layout)
    with pytest.raises(ops.Unsupported, match=wanted):
        call.banded_attention(bands)


def test_a_precision_that_the_device_lacks_is_refused_at_once(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = clip()
    monkeypatch.setattr(ops.Impl, "precisions", ("model",))
    for kind in {type(impl) for impl in ops.implementations("attention")}:
        monkeypatch.setattr(kind, "precisions", ("model",))
    with pytest.raises(ops.Unsupported, match=r"computes in precision model, not fp8_qk"):
        enable_sparse_attention(run.pipe, "adaspa", attention_precision="fp8_qk")
    with enable_sparse_attention(run.pipe, "adaspa"):
        pass


def test_a_named_kernel_with_oblong_blocks() -> None:
    config = SparseConfig(AdaSpa(block=(128, 64)), impl="cpu")
    check_implementation(config, 64, torch.float32, torch.device("cpu"))
