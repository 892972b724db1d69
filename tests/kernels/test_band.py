"""Banded attention of all implementations against the fp64 reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import bands as bench
from benchmarks import check_bands as check
from benchmarks.check_kernels import Finding
from dit_sparse.bands import FULL, SKIP, BandMask, HeadPattern
from dit_sparse.kernels import ops
from dit_sparse.layout import TokenLayout

GPU = torch.cuda.is_available()
# The interpreter has no bfloat16 matrix product.
HALF = torch.bfloat16 if GPU else torch.float16
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
SMALL = {case.name: case for case in check.CASES}


def cases(names: tuple[str, ...] = tuple(SMALL)) -> list:
    small = [pytest.param(SMALL[name], id=name) for name in names]
    return small + [pytest.param(c, id=c.name, marks=gpu) for c in check.LARGE_CASES]


def assert_passed(findings: list[Finding]) -> None:
    assert all(finding.passed for finding in findings), findings


@pytest.mark.parametrize("case", cases())
def test_triton(case: check.BandCase, device: str) -> None:
    assert_passed(check.check(case, HALF, device, "pointer"))


@pytest.mark.parametrize("case", cases(("text-last", "image")))
def test_triton_tma(case: check.BandCase, device: str) -> None:
    if check.tma_refused(case, HALF, device):
        pytest.skip("no TMA for this case")
    assert_passed(check.check(case, HALF, device, "tma"))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_offsets_beyond_32_bits(device: str) -> None:
    assert_passed(check.check_far(device))


@pytest.mark.parametrize("name", ["padding", "less-than-a-block"])
def test_triton_fp32(name: str, device: str) -> None:
    assert_passed(check.check(SMALL[name], torch.float32, device, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in check.CASES])
def test_cpu(case: check.BandCase, dtype: torch.dtype) -> None:
    assert_passed(check.check(case, dtype, "cpu", "cpu"))


def random_call(heads: int, layout: TokenLayout) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (2, layout.tokens, heads, 16)
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_reference_and_cpu_equal_plain_softmax_under_the_token_mask(impl: str) -> None:
    case = SMALL["five-text-first"]
    bands = case.bands
    q, k, v = random_call(len(case.heads), bands.layout)
    found = ops.banded_attention(q, k, v, bands, impl=impl)
    for head in range(len(case.heads)):
        keep = bands.tokens(head)
        scores = q[:, :, head] @ k[:, :, head].mT / 4
        scores = scores.masked_fill(~keep, float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        torch.testing.assert_close(found.out[:, :, head], weights @ v[:, :, head])
        torch.testing.assert_close(found.lse[:, head], scores.logsumexp(-1))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_any_assignment_and_order_of_heads_equals_each_head_alone(impl: str, device: str) -> None:
    layout = TokenLayout((2, 6, 10), 9)
    kinds = [FULL, SKIP, HeadPattern(0), HeadPattern(columns=1, shift=0.5)]
    kinds.append(HeadPattern(0, order="position_major"))
    rng = torch.Generator().manual_seed(1)
    # Large tiles make the interpreter quick.
    dtype = HALF if impl == "triton" else torch.float32
    for _ in range(2):
        heads = tuple(kinds[i] for i in torch.randint(0, len(kinds), (5,), generator=rng).tolist())
        q, k, v = (x[:1].to(device, dtype) for x in random_call(5, layout))
        together = ops.banded_attention(q, k, v, BandMask(heads, 64, layout), impl=impl)
        for head, pattern in enumerate(heads):
            alone = ops.banded_attention(
                *(x[:, :, head : head + 1] for x in (q, k, v)),
                BandMask((pattern,), 64, layout),
                impl=impl,
            )
            torch.testing.assert_close(together.out[:, :, head], alone.out[:, :, 0])
            torch.testing.assert_close(together.lse[:, head], alone.lse[:, 0])


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_skipped_head_is_zero_and_its_keys_and_values_are_not_read(
    impl: str, device: str
) -> None:
    layout = TokenLayout((2, 5, 8), 3)
    q, k, v = (x[:1].to(device, torch.float32) for x in random_call(3, layout))
    k[:, :, 1] = v[:, :, 1] = float("nan")
    bands = BandMask((HeadPattern(0), SKIP, FULL), 64, layout)
    found = ops.banded_attention(q, k, v, bands, impl=impl)
    assert not found.out[:, :, 1].any()
    assert found.lse[:, 1].isneginf().all()
    assert found.out.isfinite().all()
    assert found.out[:, :, [0, 2]].any()


def test_mismatched_operands_are_refused() -> None:
    layout = TokenLayout((2, 5, 8))
    q, k, v = random_call(2, layout)
    with pytest.raises(ValueError, match="80 tokens and 1 heads"):
        ops.banded_attention(q, k, v, BandMask((FULL,), 64, layout))
    with pytest.raises(ValueError, match="for 90 tokens"):
        ops.banded_attention(q, k, v, BandMask((FULL, SKIP), 64, TokenLayout((2, 5, 9))))
    with pytest.raises(ops.Unsupported, match="blocks must each be one of"):
        bands = BandMask((FULL, SKIP), 32, layout)
        ops.banded_attention(*(x.float() for x in (q, k, v)), bands, impl="triton")


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_the_benchmark_runs_at_toy_size(tmp_path: Path) -> None:
    output = tmp_path / "bands.json"
    assert bench.main(["--toy", "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    assert {"name", "torch", "triton"} <= set(report["machine"])
    ways = {(row["way"], row["pattern"]) for row in report["rows"]}
    assert {
        ("bands-tma", "mixed"),
        ("lists+reorder", "multi_diagonal"),
        ("lists", "diagonal"),
    } < ways
    assert all(row["ms"] > 0 and 0 < row["density"] <= 1 for row in report["rows"])


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_the_benchmark_measures_nothing_if_a_result_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "check", lambda *_: [Finding("out", 1.0, 0.5)])
    assert bench.main(["--toy", "--output", str(tmp_path / "bands.json")]) == 1
    assert not (tmp_path / "bands.json").exists()
