"""The Triton kernels against the fp64 reference; interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import check_kernels as check
from dit_sparse.kernels import ops, triton_attention
from dit_sparse.kernels.triton_padding import validity
from dit_sparse.mask import BlockMask

GPU = torch.cuda.is_available()
# The interpreter has no bfloat16 matrix product.
HALF = torch.bfloat16 if GPU else torch.float16
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]


def cases() -> list:
    small = [pytest.param(case, id=case.name) for case in check.CASES]
    return small + [pytest.param(c, id=c.name, marks=gpu) for c in check.LARGE_CASES]


def cases_and_dtypes() -> list:
    """All cases in 16 bit and the first few, which differ most, in fp32."""
    single = [pytest.param(c, torch.float32, id=f"{c.name}-fp32") for c in check.CASES[:6]]
    return single + [
        pytest.param(p.values[0], HALF, id=f"{p.id}-half", marks=p.marks) for p in cases()
    ]


def assert_passed(findings: list[check.Finding]) -> None:
    assert all(finding.passed for finding in findings), findings


@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes())
def test_attention_and_row_lse(case: check.Case, dtype: torch.dtype, device: str) -> None:
    assert_passed(check.check_attention(case, dtype, device, "triton"))


@pytest.mark.parametrize("case", cases())
def test_tma_path(case: check.Case, device: str) -> None:
    if refusals := check.refusals("tma", case, HALF, device):
        pytest.skip("; ".join(refusals))
    assert_passed(check.check_attention(case, HALF, device, "tma"))


@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes())
def test_block_mass(case: check.Case, dtype: torch.dtype, device: str) -> None:
    assert_passed(check.check_block_mass(case, dtype, device))


def strided() -> list:
    """Cases of block mass, and of which query row in how many it is."""
    return [
        pytest.param(*p.values, stride, id=f"{p.id}-{stride}", marks=p.marks)
        for p in cases_and_dtypes()
        for stride in (2, 4)
    ]


@pytest.mark.parametrize(("case", "dtype", "stride"), strided())
def test_block_mass_of_some_rows(
    case: check.Case, dtype: torch.dtype, stride: int, device: str
) -> None:
    assert_passed(check.check_block_mass(case, dtype, device, stride=stride))


def test_block_mass_refuses_other_blocks(device: str) -> None:
    q = torch.zeros(1, 64, 1, 16, device=device)
    for block in ((8, 64), (16, 32), (64, 32)):
        with pytest.raises(
            ops.Unsupported, match=r"query blocks must be one of \(16, 32, 64, 128\)"
        ):
            ops.block_mass(q, q, torch.zeros(1, 1, 64, device=device), block, impl="triton")


def blocked() -> list:
    return [p for p in cases_and_dtypes() if p.values[0].block is not None]


@pytest.mark.parametrize(("case", "dtype"), blocked())
def test_attention_with_summaries(case: check.Case, dtype: torch.dtype, device: str) -> None:
    assert_passed(check.check_summary(case, dtype, device, "triton"))
    if not check.refusals("tma", case, dtype, device):
        assert_passed(check.check_summary(case, dtype, device, "tma"))


@pytest.mark.parametrize(("case", "dtype"), blocked())
def test_summarize(case: check.Case, dtype: torch.dtype, device: str) -> None:
    assert_passed(check.check_summarize(case, dtype, device))


@pytest.mark.parametrize("case", cases())
def test_top_blocks(case: check.Case, device: str) -> None:
    assert_passed(check.check_top_blocks(case, device))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("function", [check.check_far_keys, check.check_far_queries])
def test_offsets_beyond_32_bits(function, device: str) -> None:
    assert_passed(function(device))


def test_merged_halves_are_the_whole(device: str) -> None:
    x = check.build(check.Case("whole", block=None), torch.float32, device)
    keep = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = BlockMask.from_dense(keep, 64, (150, 200)).to(device)
    parts = [ops.attention(x.q, x.k, x.v, m, impl="triton") for m in (mask, ~mask)]
    whole = ops.attention(x.q, x.k, x.v, impl="triton")
    merged = ops.merge(*parts)
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)


def test_every_tile_size_gives_the_same_result(device: str) -> None:
    case = check.Case("tiles", block=(128, 128), padding=True, batch=1, mask=(1, 2))
    x = check.build(case, torch.float16, device)
    call = ops.AttentionCall(x.q, x.k, x.v, x.mask, x.key_valid, 0.125)
    results = [
        triton_attention.launch(call, config=triton_attention.Config(q, k, 4, 2))
        for q, k in ((128, 128), (64, 32), (32, 64))
    ]
    # The weights are rounded to fp16 relative to a running maximum that depends on the tile.
    rounding = 2 * torch.finfo(torch.float16).eps * float(results[0].out.abs().max())
    for other in results[1:]:
        torch.testing.assert_close(other.out, results[0].out, atol=rounding, rtol=0.0)
        torch.testing.assert_close(other.lse, results[0].lse)


def test_mass_of_blocks_sums_to_their_rows(device: str) -> None:
    x = check.build(check.Case("sums", block=None, padding=True), torch.float16, device)
    lse = ops.row_lse(x.q, x.k, key_valid=x.key_valid, impl="triton")
    mass = ops.block_mass(x.q, x.k, lse, (64, 128), key_valid=x.key_valid, impl="triton")
    rows = torch.tensor([64.0, 64.0, 22.0], device=device).expand(2, 2, 3)
    torch.testing.assert_close(mass.sum(-1), rows)


def test_empty_sequences(device: str) -> None:
    q = torch.ones(1, 5, 2, 16, device=device)
    none = torch.ones(1, 0, 2, 16, device=device)
    without_keys = ops.attention(q, none, none, impl="triton")
    assert not without_keys.out.any()
    assert without_keys.lse.isneginf().all()
    assert ops.attention(none, q, q, impl="triton").out.shape == (1, 0, 2, 16)


@pytest.mark.parametrize(
    ("dtype", "dim", "block", "scale", "message"),
    [
        (torch.float64, 64, 64, None, "dtype must be"),
        (torch.float32, 320, 64, None, "head dim must be at most 256, got 320"),
        (torch.float32, 64, 32, None, "blocks must each be one of"),
        (torch.float32, 64, 64, -1.0, "scale must be positive"),
    ],
)
def test_refusals(
    dtype: torch.dtype, dim: int, block: int, scale: float | None, message: str, device: str
) -> None:
    q = torch.zeros(1, 64, 1, dim, dtype=dtype, device=device)
    mask = BlockMask.full(block, 64, device)
    with pytest.raises(ops.Unsupported, match=message):
        ops.attention(q, q, q, mask, scale=scale, impl="triton")


@pytest.mark.skipif(GPU, reason="about the interpreter")
def test_interpreter_is_never_chosen_automatically() -> None:
    q = torch.zeros(1, 4, 1, 16)
    call = ops.AttentionCall(q, q, q, None, None, 1.0)
    assert ops.select("attention", call).name != "triton"


def test_valid_keys_before_the_first_that_is_not(device: str) -> None:
    valid = torch.ones(6, 20000, dtype=torch.bool, device=device)
    for row, first in enumerate((0, 1, 8191, 8192, 19999)):
        valid[row, first] = False
        valid[row, first + 3 :] = False
    flags, prefix = validity(valid)
    assert flags is not None and prefix is not None
    assert prefix.tolist() == [0, 1, 8191, 8192, 19999, 20000]
    assert torch.equal(flags.bool(), valid)
    assert validity(None) == (None, None)
