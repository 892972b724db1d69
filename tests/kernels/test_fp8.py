"""Attention in 8 bits: what is rounded, and the kernels beside that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import check_kernels as check
from dit_sparse.kernels import fp8, ops, probe, triton_fp8, triton_quantize
from dit_sparse.kernels.fp8 import round_e4m3, rounded_scores, rounded_values
from dit_sparse.kernels.probe import ShapeClass
from dit_sparse.kernels.reference_fp8 import ReferenceFp8
from dit_sparse.kernels.triton_common import INTERPRETED
from dit_sparse.kernels.triton_quantize import quantize
from dit_sparse.mask import BlockMask

GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if GPU else torch.float16
CASES = [pytest.param(case, id=case.name) for case in check.CASES]
# e4m3 keeps a relative error of 2**-4 down to 2**-6, and 2**-10 of a step below.
RELATIVE, ABSOLUTE = 2.0**-4, 2.0**-10


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes triton's interpreter round to e4m3 as GPUs do: its own loses carries (triton 3.9)."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, mode):
        if target != tl.float8e4nv or source != tl.float32:
            return original(data, source, target, mode)
        exact = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32)
        return exact.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def operands(tokens: int = 300, dim: int = 32, offset: float = 0.0) -> tuple[Tensor, ...]:
    """fp64 q, k and v of two heads; all keys of a head share an offset of that size."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, dim, generator=rng).double() for _ in range(3))
    return q, k + offset * torch.randn(2, 1, 2, dim, generator=rng).double(), v


def score_error(q: Tensor, k: Tensor, key_valid: Tensor | None = None) -> float:
    """The most that rounding can change a score, by the format's own precision."""
    k = k - fp8.key_shift(k, key_valid)
    if key_valid is not None:
        k = k.masked_fill(~key_valid[..., None, None], 0.0)
    q_step = fp8.scales(q.abs().amax(-1, keepdim=True))
    q_error = RELATIVE * q.abs() + ABSOLUTE * q_step
    k_error = RELATIVE * k.abs() + ABSOLUTE * fp8.scales(k.abs().amax())
    q, k, q_error, k_error = (x.transpose(1, 2).abs() for x in (q, k, q_error, k_error))
    changed = q_error @ k.mT + q @ k_error.mT + q_error @ k_error.mT
    return float(changed.max()) * q.shape[-1] ** -0.5


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_log_sum_exp_stays_that_of_the_scores(offset: float) -> None:
    q, k, v = operands(offset=offset)
    truth = ops.attention(q, k, v, impl="reference")
    bound = score_error(q, k)
    for precision in ops.FP8:
        found = ops.attention(q, k, v, precision=precision, impl="reference")
        # It moves by no more than the largest change of a score.
        error = (found.lse - truth.lse).abs().max()
        assert 0 < error <= bound, precision
    if offset:
        # What the smoothing takes away is far more than that: it was given back.
        assert (
            rounded_scores(ops.AttentionCall(q, k, v, None, None, 32**-0.5), q.dtype)[2].abs().max()
            > 4 * bound
        )


def test_smoothing_takes_the_offset_out_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(offset: float) -> float:
        q, k, v = operands(offset=offset)
        truth = ops.attention(q, k, v, impl="reference").out
        return relative(ops.attention(q, k, v, precision="fp8_qk", impl="reference").out, truth)

    plain, shifted = error(0.0), error(20.0)
    monkeypatch.setattr(fp8, "key_shift", lambda k, valid: torch.zeros_like(k[:, :1]))
    assert shifted < 1.5 * plain < error(20.0) / 2


def test_error_beside_16_bits() -> None:
    q, k, v = operands(1024, 64)
    truth = ops.attention(q, k, v, impl="reference").out
    sixteen = ops.attention(*(x.bfloat16() for x in (q, k, v)), impl="cpu").out
    errors = [relative(sixteen, truth)] + [
        relative(ops.attention(q, k, v, precision=precision, impl="reference").out, truth)
        for precision in ops.FP8
    ]
    # Each step rounds more. 16 bits keep 5 bits more than 8; of those, sums over keys are left.
    assert errors == sorted(errors)
    assert errors[-1] < 2**5 * errors[0]


def test_what_products_see_is_e4m3() -> None:
    q, k, v = operands(130)
    valid = torch.ones(2, 130, dtype=torch.bool)
    valid[1, 100:] = False
    mask = BlockMask.full((64, 64), (130, 130))
    call = ops.AttentionCall(q, k, v, mask, valid, 0.2, precision="fp8_qkpv")
    rounded_q, rounded_k, _ = rounded_scores(call, torch.float64)
    values = rounded_values(call, torch.float64)
    assert not rounded_k[1, 100:].any() and not values[1, 100:].any()
    step = q.abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(round_e4m3(rounded_q / step), rounded_q / step)
    assert ((rounded_q - q).abs() <= RELATIVE * q.abs() + ABSOLUTE * step).all()
    shifted = k - fp8.key_shift(k, valid)
    for block in (slice(0, 64), slice(64, 128), slice(128, 130)):
        own = shifted[0, block].abs().amax((0, 2), keepdim=True) / 448
        grid = rounded_k[0, block] / own
        torch.testing.assert_close(round_e4m3(grid), grid)
    step = v[0].abs().amax(0) / 448
    torch.testing.assert_close(round_e4m3(values[0] / step), values[0] / step)
    assert torch.equal(fp8.round_weights(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_rows_and_blocks_of_next_to_nothing(device: str, rounding: None) -> None:
    rng = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, n, 2, 32, generator=rng).to(device, HALF) for n in (64, 128))
    k, v = torch.zeros_like(v), v + 1
    q[:, :9], v[..., 3] = 0.0, 0.0
    mask = BlockMask.full(64, (64, 128), torch.device(device))
    for precision in ops.FP8:
        found = ops.attention(q, k, v, mask, precision=precision, impl="triton")
        assert relative(found.out, v.float().mean(1, keepdim=True).expand(q.shape)) < RELATIVE
        assert not found.out[..., 3].any()
        torch.testing.assert_close(found.lse, torch.full_like(found.lse, 128.0).log())


def test_keys_that_nobody_reads_may_hold_anything() -> None:
    q, k, v = operands(256)
    keep = torch.tensor([[[[True, False]]]])
    mask = BlockMask.from_dense(keep, (256, 128), (256, 256))
    clean = ops.attention(q, k, v, mask, precision="fp8_qkpv", impl="reference")
    k[:, 128:], v[:, 128:] = float("nan"), float("inf")
    for precision in ops.FP8:
        found = ops.attention(q, k, v, mask, precision=precision)
        assert found.out.isfinite().all() and found.lse.isfinite().all()
    # Another vector was subtracted, which is exact but for the rounding.
    assert relative(found.out, clean.out) < 0.1


@pytest.mark.parametrize("precision", ops.FP8)
@pytest.mark.parametrize("case", CASES)
def test_kernel(case: check.Case, precision: str, device: str, rounding: None) -> None:
    if refusals := check.fp8_refusals("triton", case, HALF, device, precision):
        pytest.skip("; ".join(refusals))
    findings = check.check_fp8(case, HALF, device, precision, "triton")
    assert all(finding.passed for finding in findings), findings


@pytest.mark.skipif(not INTERPRETED, reason="tensor cores accumulate with fewer bits")
@pytest.mark.parametrize("precision", ops.FP8)
@pytest.mark.parametrize("case", CASES)
def test_kernel_beside_the_emulation(case: check.Case, precision: str, rounding: None) -> None:
    x = check.build(case, HALF, "cpu")
    options = {"key_valid": x.key_valid, "precision": precision}
    found = ops.attention(x.q, x.k, x.v, x.mask, **options, impl="triton")
    right = ops.attention(
        x.q.float(), x.k.float(), x.v.float(), x.mask, **options, impl="reference"
    )
    torch.testing.assert_close(found.lse, right.lse, atol=1e-4, rtol=0)
    # Weights are rounded beside a running maximum: those of 8 bits by up to 2**-4 of themselves.
    allowed = 2 * torch.finfo(HALF).eps if precision == "fp8_qk" else RELATIVE
    assert relative(found.out, right.out) < allowed


@pytest.mark.parametrize("case", CASES[:6])
def test_emulation_on_the_cpu(case: check.Case) -> None:
    x = check.build(case, torch.float32, "cpu")
    options = {"key_valid": x.key_valid, "precision": "fp8_qk"}
    names: list[str] = []
    found = ops.attention(x.q, x.k, x.v, x.mask, **options, on_choice=names.append)
    right = ops.attention(x.q, x.k, x.v, x.mask, **options, impl="reference")
    assert names == ["cpu fp8_qk"]
    torch.testing.assert_close(found.out, right.out)
    torch.testing.assert_close(found.lse, right.lse)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dim", [40, 64])
def test_rounding_kernels(dim: int, padding: bool, device: str, rounding: None) -> None:
    case = check.Case("rounding", (150, 200), dim, (128, 64), padding=padding, layout="fused")
    x = check.build(case, HALF, device)
    call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, 0.3, precision="fp8_qkpv")
    with check.poisoned_memory():
        found, ordered = quantize(call), quantize(call, fragments=True)
    q, k, lift = rounded_scores(call, torch.float32)
    v = rounded_values(call, torch.float32)
    assert found.v is not None and found.v_scale is not None and ordered.v is not None
    # Ties may round to either side where a scale differs by its last bit: one step in 2**4.
    mine = found.q.float() * found.q_scale[..., None]
    torch.testing.assert_close(mine.transpose(1, 2), q, rtol=2 * RELATIVE, atol=1e-6)
    assert relative(mine.transpose(1, 2), q) < 1e-3
    scale = found.k_scale.repeat_interleave(64, 2)[:, :, :200, None]
    mine = (found.k.float() * scale).transpose(1, 2)
    read = k.isfinite()
    assert read.any() and relative(mine[read], k[read]) < 1e-3
    torch.testing.assert_close(found.lift, lift)
    assert found.v.shape[-1] == 256 and not found.v[..., 200:].float().any()
    mine = (found.v.float() * found.v_scale[..., None])[..., :200].permute(0, 3, 1, 2)
    read = v.isfinite()
    assert read.any() and relative(mine[read], v[read]) < 1e-3
    # Thread t of four holds columns 2t, 2t + 1 of each eight: it reads them as one run of four.
    held = [8 * half + 2 * thread + one for thread in range(4) for half in (0, 1) for one in (0, 1)]
    tokens = torch.tensor([16 * group + place for group in range(16) for place in held])
    raw = found.v.view(torch.uint8)
    assert torch.equal(ordered.v.view(torch.uint8), raw[..., tokens.to(device)])


def test_a_sample_of_the_keys_is_averaged(
    monkeypatch: pytest.MonkeyPatch, device: str, rounding: None
) -> None:
    for module in (fp8, triton_quantize):
        monkeypatch.setattr(module, "SAMPLES", 70)
    x = check.build(check.Case("sample", (64, 200), block=None, padding=True), HALF, device)
    call = ops.AttentionCall(x.q, x.k, x.v, None, x.key_valid, 0.3, precision="fp8_qk")
    lift = rounded_scores(call, torch.float32)[2]
    torch.testing.assert_close(quantize(call).lift, lift)
    k = x.k.float().nan_to_num()
    mean = k.sum(1) / (~x.k.isnan()).sum(1)
    whole = 0.3 * torch.einsum("bqhd,bhd->bhq", x.q.float(), mean)
    assert not torch.allclose(lift, whole, atol=1e-3)


@pytest.mark.parametrize("precision", ops.FP8)
def test_summaries_are_added_in_the_models_dtype(
    precision: str, device: str, rounding: None
) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, 2, 64, generator=rng).to(device, HALF) for _ in range(3))
    keep = torch.rand(1, 2, 4, 4, generator=rng) < 0.5
    keep[:, 1, 2] = False  # rows of which summaries are all
    mask = BlockMask.from_dense(keep, 64, (256, 256)).to(device)
    summary = ops.summarize(k, v, 64, first_order=True, impl="triton")
    options = {"summary": summary, "precision": precision}
    found = ops.attention(q, k, v, mask, impl="triton", **options)
    host = [x.cpu().double() for x in (q, k, v)]
    still = replace(
        summary,
        **{
            name: getattr(summary, name).cpu().double()
            for name in ("key_mean", "value_mean", "count", "slope")
        },
        rounded=None,
    )
    cpu = mask.to("cpu")
    right = ops.attention(*host, cpu, summary=still, precision=precision, impl="reference")
    truth = ops.attention(*host, cpu, summary=still, impl="reference")
    assert found.lse_kept is not None and right.lse_kept is not None
    torch.testing.assert_close(found.lse_kept.cpu().double(), right.lse_kept, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.lse.cpu().double(), right.lse, atol=1e-3, rtol=0)
    # Without kept keys nothing is in 8 bits.
    empty = right.lse_kept.transpose(1, 2) == float("-inf")
    assert empty.any()
    assert relative(found.out.cpu()[empty], truth.out[empty]) < 4 * torch.finfo(HALF).eps
    assert relative(found.out.cpu(), truth.out) < 2 * relative(right.out, truth.out)


def without_smoothing(call: ops.AttentionCall) -> ops.Attended:
    found = ReferenceFp8()(call)
    return found._replace(lse=found.lse - rounded_scores(call, torch.float32)[2])


def without_scales(call: ops.AttentionCall) -> ops.Attended:
    return ReferenceFp8()(replace(call, q=call.q / 2, scale=call.scale))


def test_the_test_before_use_finds_wrong_kernels() -> None:
    for precision in ops.FP8:
        kind = ShapeClass(torch.device("cpu"), torch.bfloat16, 64, (128, 64), precision=precision)
        assert kind.example().precision == precision
        assert ShapeClass.of(kind.example()) == kind
        assert probe.disagreement(ReferenceFp8(), kind) is None
        assert "LSE" in str(probe.disagreement(without_smoothing, kind))
        assert "output" in str(probe.disagreement(without_scales, kind))


# Who computes what.


@pytest.fixture
def small() -> Iterator[tuple[Tensor, BlockMask]]:
    yield torch.ones(1, 64, 2, 16), BlockMask.full(64, (64, 64))


def test_refusals(small: tuple[Tensor, BlockMask]) -> None:
    x, mask = small
    with pytest.raises(ValueError, match=r"attention_precision must be one of .* got 'fp8'"):
        ops.attention(x, x, x, mask, precision="fp8")
    with pytest.raises(ops.Unsupported, match=r"8-bit products take bfloat16 and float16, got"):
        ops.attention(x, x, x, mask, precision="fp8_qk", impl="triton")
    wide = torch.ones(1, 64, 2, 256, dtype=torch.float16)
    with pytest.raises(ops.Unsupported, match=r"head dims up to 128, got 256"):
        ops.attention(wide, wide, wide, mask, precision="fp8_qk", impl="triton")
    # One of the same name for another precision is not spoken of.
    with pytest.raises(ops.Unsupported) as refused:
        ops.attention(x.double(), x.double(), x.double(), mask, impl="triton")
    assert "precision" not in str(refused.value)
    with pytest.raises(ops.Unsupported, match="cudnn: computes in precision model, not fp8_qk"):
        ops.attention(x, x, x, mask, precision="fp8_qk", impl="cudnn")
    # The others say so before anything else.
    flash = [i for i in ops.implementations("attention") if i.precisions == ("model",)]
    call = ops.AttentionCall(x, x, x, mask, None, 1.0, precision="fp8_qk")
    assert flash
    for impl in flash:
        assert "not fp8_qk" in ops._precision_reasons(impl, call)[0]


def test_a_gpu_without_8_bit_products_is_no_place_for_the_emulation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_fp8, "capability", lambda tensor: (8, 6))
    x = torch.empty(1, 64, 2, 64, dtype=torch.float16, device="meta")
    call = ops.AttentionCall(x, x, x, None, None, 1.0, precision="fp8_qkpv")
    assert "8.9 or newer, got 8.6; use attention_precision='model'" in str(
        triton_fp8.capability_reasons(call)
    )
    with pytest.raises(ops.Unsupported, match="emulates 8-bit products"):
        ops.select("attention", call)


def test_on_the_cpu_it_is_emulated_and_named(small: tuple[Tensor, BlockMask]) -> None:
    x, mask = small
    names: list[str] = []
    for precision in ops.PRECISIONS:
        ops.attention(x, x, x, mask, precision=precision, on_choice=names.append)
    assert names == ["cpu", "cpu fp8_qk", "reference fp8_qkpv"]
    assert "attention by its rank" in ops.why_chosen("cpu fp8_qk")
