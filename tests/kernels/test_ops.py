"""Every implementation against the fp64 reference, and the choice between implementations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import ops
from dit_sparse.mask import BlockMask

# The Triton implementation has its own tests: interpreted, it is too slow for these.
NAMES = ("reference", "cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that an output that is not written shows."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


@dataclass(frozen=True)
class Case:
    """Sizes of a call; ``mask`` is the (batch, heads) of the mask, None without one."""

    name: str
    seq: tuple[int, int]
    block: tuple[int, int] = (16, 16)
    mask: tuple[int, int] | None = (2, 3)
    density: float = 0.4
    padding: bool = False
    batch: int = 2
    heads: int = 3
    dim: int = 16


CASES = [
    Case("dense", (96, 96), mask=None),
    Case("dense-padding", (70, 45), mask=None, padding=True),
    Case("even", (96, 96)),
    Case("ragged", (83, 101)),
    Case("ragged-padding", (83, 101), padding=True),
    Case("broadcast", (64, 50), mask=(1, 1), padding=True),
    Case("broadcast-batch", (64, 50), mask=(1, 3)),
    Case("broadcast-heads", (64, 50), mask=(2, 1)),
    Case("wide-blocks", (50, 90), block=(7, 33)),
    Case("tall-blocks", (90, 50), block=(37, 5), padding=True),
    Case("one-block", (20, 9), block=(64, 64), density=1.0),
    Case("single-tokens", (19, 23), block=(1, 1)),
    Case("sparse", (160, 160), density=0.05),
    Case("empty", (40, 40), density=0.0),
    Case("full", (83, 101), density=1.0, padding=True),
    Case("odd-dim", (33, 47), dim=5),
]


@dataclass(frozen=True)
class Operands:
    """Tensors of a case; poisoned where an implementation must not look."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None
    key_valid: Tensor | None
    seen: Tensor  # [batch, heads, q_len, kv_len]: kept and valid


def operands(case: Case, dtype: torch.dtype, seed: int = 0) -> Operands:
    rng = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> Tensor:
        # Strides of a head-major tensor inside a wider one, as after a fused projection.
        wide = torch.randn(case.batch, case.heads, tokens, case.dim + 3, generator=rng)
        return wide.to(dtype)[..., : case.dim].transpose(1, 2)

    q, k, v = draw(case.seq[0]), draw(case.seq[1]), draw(case.seq[1])
    mask, key_valid = None, None
    seen = torch.ones(case.batch, case.heads, *case.seq, dtype=torch.bool)
    if case.mask is not None:
        blocks = [-(-n // b) for n, b in zip(case.seq, case.block, strict=True)]
        keep = torch.rand(*case.mask, *blocks, generator=rng) < case.density
        if 0 < case.density < 1:
            keep[:, :, 0] = False  # an empty row
            keep[:, :, -1] = True  # and a full one
        mask = BlockMask.from_dense(keep, case.block, case.seq)
        mask = with_garbage(mask)
        seen = seen & mask.tokens()
    if case.padding:
        key_valid = torch.rand(case.batch, case.seq[1], generator=rng) < 0.6
        key_valid[0, : case.block[1]] = False  # a block of nothing but padding
        key_valid[:, -1] = False
        for x in (k, v):
            x.masked_fill_(~key_valid[:, :, None, None], float("nan"))
        seen = seen & key_valid[:, None, None]
    # Keys that no query of a head sees.
    unseen = ~seen.any(-2).transpose(1, 2)
    for x in (k, v):
        x.masked_fill_(unseen[..., None], float("nan"))
    return Operands(q, k, v, mask, key_valid, seen)


def with_garbage(mask: BlockMask) -> BlockMask:
    """The same mask with out-of-range entries past every count."""
    listed = torch.arange(mask.kv_indices.shape[-1])
    dead = listed >= mask.kv_num_blocks.unsqueeze(-1)
    indices = mask.kv_indices.masked_fill(dead, 2**31 - 1)
    return BlockMask(mask.kv_num_blocks, indices, mask.block, mask.seq)


def eager(x: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention by torch's own softmax in ``dtype``; what a tolerance is derived from."""
    q, k, v = (t.to(dtype).nan_to_num().transpose(1, 2) for t in (x.q, x.k, x.v))
    scores = (q @ k.mT * x.q.shape[-1] ** -0.5).masked_fill(~x.seen, float("-inf"))
    out = scores.softmax(-1).masked_fill(~x.seen, 0) @ v
    return out.transpose(1, 2), scores.logsumexp(-1)


def reference(x: Operands) -> ops.Attended:
    q, k, v = (t.double() for t in (x.q, x.k, x.v))
    return ops.attention(q, k, v, x.mask, key_valid=x.key_valid, impl="reference")


def assert_close(actual: Tensor, exact: Tensor, peer: Tensor, eps: float) -> None:
    """Max error at most twice (the error of ``peer``, plus ``eps`` of the largest value)."""
    assert torch.equal(actual == float("-inf"), exact == float("-inf"))
    assert not actual.isnan().any()
    finite = exact.isfinite()
    if not finite.any():
        return
    actual, exact, peer = (t.double()[finite] for t in (actual, exact, peer))
    bound = 2 * ((peer - exact).abs().max() + eps * exact.abs().max())
    assert (actual - exact).abs().max() <= bound


def epsilon(x: Operands, dtype: torch.dtype) -> float:
    """Rounding unit of ``dtype``; in fp64 that of a score, for there the reference rounds too."""
    eps = torch.finfo(dtype).eps
    if dtype != torch.float64:
        return eps
    q, k = (t.nan_to_num().transpose(1, 2) for t in (x.q, x.k))
    return eps * (1 + float((q @ k.mT).abs().max()) * x.q.shape[-1] ** -0.5)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_attention_matches_reference(case: Case, dtype: torch.dtype, name: str) -> None:
    x = operands(case, dtype)
    exact = reference(x)
    got = ops.attention(x.q, x.k, x.v, x.mask, key_valid=x.key_valid, impl=name)
    assert got.out.shape == x.q.shape and got.out.dtype == dtype and got.out.is_contiguous()
    assert got.lse.shape == exact.lse.shape and got.lse.dtype == lse_dtype(dtype)
    assert_close(got.out, exact.out, eager(x, dtype)[0], epsilon(x, dtype))
    work = lse_dtype(dtype)
    assert_close(got.lse, exact.lse, eager(x, work)[1], epsilon(x, work))
    empty = ~x.seen.any(-1)
    assert torch.equal(got.lse == float("-inf"), empty)
    assert (got.out.transpose(1, 2)[empty] == 0).all()

    lse = ops.row_lse(x.q, x.k, x.mask, key_valid=x.key_valid, impl=name)
    assert lse.shape == exact.lse.shape and lse.dtype == work
    assert_close(lse, exact.lse, eager(x, work)[1], epsilon(x, work))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(scale: float, name: str) -> None:
    x = operands(CASES[3], torch.float64)
    scaled = {"key_valid": x.key_valid, "impl": name}
    got = ops.attention(x.q, x.k, x.v, x.mask, scale=scale, **scaled)
    exact = ops.attention(x.q * scale, x.k, x.v, x.mask, scale=1.0, **scaled)
    torch.testing.assert_close(got.out, exact.out)
    torch.testing.assert_close(got.lse, exact.lse)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poisoned", ["k", "v"])
def test_skipped_blocks_do_not_reach_a_row(poisoned: str, name: str) -> None:
    """A NaN block stains exactly the rows that keep it."""
    x = operands(CASES[3], torch.float32)
    assert x.mask is not None
    tensors = {"q": x.q, "k": x.k, "v": x.v}
    tensors[poisoned] = tensors[poisoned].clone()
    tensors[poisoned][:, 32:48] = float("nan")
    out = ops.attention(**tensors, mask=x.mask, impl=name).out
    stained = out.isnan().any(-1).transpose(1, 2)
    assert torch.equal(stained, x.seen[..., 32:48].any(-1))


@pytest.mark.parametrize("name", NAMES)
def test_merge_of_mask_and_complement_is_dense(name: str) -> None:
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 3, 8, generator=rng).double() for n in (45, 70, 70))
    keep = torch.rand(1, 3, 6, 5, generator=rng) < 0.5
    keep[:, 0], keep[:, 1, 2] = False, True  # an empty head and a full row
    mask = BlockMask.from_dense(keep, (8, 16), (45, 70))
    valid = torch.rand(2, 70, generator=rng) < 0.8
    whole = ops.attention(q, k, v, key_valid=valid, impl=name)
    parts = [ops.attention(q, k, v, m, key_valid=valid, impl=name) for m in (mask, ~mask)]
    merged = ops.merge(*parts)
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)
    nothing = torch.zeros_like(valid)
    empty = ops.attention(q, k, v, key_valid=nothing, impl=name)
    again = ops.merge(empty, empty)
    assert (again.out == 0).all() and (again.lse == float("-inf")).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_block_mass_matches_reference(case: Case, dtype: torch.dtype, name: str) -> None:
    x = operands(case, dtype)
    k = x.k if x.key_valid is None else x.k.masked_fill(~x.key_valid[..., None, None], 7.0)
    k = k.nan_to_num()  # keys that no row keeps do count here
    lse = ops.row_lse(x.q, k, x.mask, key_valid=x.key_valid, impl="reference")
    exact = ops.block_mass(
        x.q.double(), k.double(), lse, case.block, key_valid=x.key_valid, impl="reference"
    )
    if x.key_valid is not None:
        k = k.masked_fill(~x.key_valid[..., None, None], float("nan"))
    got = ops.block_mass(x.q, k, lse, case.block, key_valid=x.key_valid, impl=name)
    work = lse_dtype(dtype)
    assert got.shape == exact.shape and got.dtype == work
    # exp(s - lse) has the relative error of its exponent, at most eps * (|s| + |lse|) / 2 each
    # for the dot product of dim terms and the difference; sums of positive terms keep it.
    finite = lse[lse.isfinite()]
    scores = x.q.double().norm(dim=-1).max() * k.double().nan_to_num().norm(dim=-1).max()
    size = scores + (finite.abs().max() if finite.numel() else 0.0)
    bound = torch.finfo(work).eps * (size + max(case.block)) * case.dim**0.5
    assert not got.isnan().any()
    assert ((got.double() - exact).abs() <= bound * exact).all()


@pytest.mark.parametrize("name", NAMES)
def test_block_mass_rows_sum_to_row_counts(name: str) -> None:
    rng = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, n, 3, 8, generator=rng).double() for n in (45, 70))
    valid = torch.rand(2, 70, generator=rng) < 0.8
    lse = ops.row_lse(q, k, key_valid=valid, impl=name)
    mass = ops.block_mass(q, k, lse, (8, 16), key_valid=valid, impl=name)
    rows = torch.tensor([8.0, 8, 8, 8, 8, 5]).double()
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, 3, -1))
    lse[:, :, 3] = float("-inf")
    mass = ops.block_mass(q, k, lse, (8, 16), key_valid=valid, impl=name)
    rows[0] -= 1
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, 3, -1))


def qkv(tokens: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(1, tokens, 2, 4, dtype=dtype) for _ in range(3))


def test_implementations_are_found_best_first() -> None:
    for op in ("attention", "row_lse", "block_mass"):
        found = ops.implementations(op)
        assert {"reference", "cpu"} <= {impl.name for impl in found}
        ranks = [impl.rank for impl in found]
        assert ranks == sorted(ranks, reverse=True)
    assert ops.implementations("convolution") == ()


def test_unknown_impl_lists_accepted_names() -> None:
    with pytest.raises(ValueError, match=r"'auto' or one of \[.*'cpu'.*'reference'.*'fastest'"):
        ops.attention(*qkv(), impl="fastest")
    with pytest.raises(ValueError, match="'fastest'"):
        ops.check_impl("fastest")
    ops.check_impl("auto")
    ops.check_impl("cpu")


def test_named_impl_lists_every_reason() -> None:
    q, k, v = qkv(dtype=torch.float8_e4m3fn)
    with pytest.raises(ops.Unsupported, match=r"cpu: needs fp32, fp64, bf16 or fp16, got .*e4m3"):
        ops.attention(q, k, v, impl="cpu")
    meta = [x.to("meta") for x in (q, k, v)]
    with pytest.raises(ops.Unsupported) as error:
        ops.attention(*meta, impl="cpu")
    assert "cpu: needs CPU tensors, got meta" in str(error.value)
    assert "cpu: needs fp32" in str(error.value)
    assert "reference" not in str(error.value)


def test_auto_takes_the_best_and_logs_once(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = qkv()
    ops._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="dit_sparse.kernels.ops"):
        for _ in range(3):
            ops.attention(q, k, v)
    chosen = [r.getMessage() for r in caplog.records if r.name == "dit_sparse.kernels.ops"]
    assert chosen == ["attention on cpu (torch.float32) is computed by 'cpu', by its rank"]


def test_operand_messages() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"q must be a floating-point .*torch.int64"):
        ops.attention(q.long(), k, v)
    with pytest.raises(ValueError, match=r"k must be a floating-point .*\(8, 2, 4\)"):
        ops.attention(q, k[0], v)
    with pytest.raises(ValueError, match=r"share dtype and device.*k torch.float64"):
        ops.attention(q, k.double(), v)
    with pytest.raises(ValueError, match="agree in batch, heads and dim"):
        ops.row_lse(q, k[:, :, :1])
    with pytest.raises(ValueError, match=r"one shape, got \(1, 8, 2, 4\) and \(1, 7, 2, 4\)"):
        ops.attention(q, k, v[:, :7])
    with pytest.raises(ValueError, match=r"key_valid must be bool .*\(1, 8\).*float32"):
        ops.attention(q, k, v, key_valid=torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"lse must be .*\(1, 2, 8\).*got \(1, 8, 2\)"):
        ops.block_mass(q, k, torch.zeros(1, 8, 2), 4)
    with pytest.raises(ValueError, match="at least 1 token"):
        ops.block_mass(q, k, torch.zeros(1, 2, 8), 0)


def test_mask_messages() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"made for \(9, 9\).*got \(8, 8\)"):
        ops.attention(q, k, v, BlockMask.full(4, 9))
    keep = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(1, 3\); q has \(1, 2\)"):
        ops.attention(q, k, v, BlockMask.from_dense(keep, 4, 8))
    with pytest.raises(ValueError, match="the mask is on meta, q on cpu"):
        ops.attention(q, k, v, BlockMask.full(4, 8, device="meta"))
