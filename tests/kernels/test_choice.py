"""Who computes a call: measured tables, priorities, missing packages, and the test before use."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_table import make_table, write_table
from dit_sparse.kernels import flash3_attention, flash4_attention, measured, nvidia, ops, probe
from dit_sparse.kernels.cudnn import CudnnAttention
from dit_sparse.kernels.flash3_attention import FlashAttention3
from dit_sparse.kernels.flash4_attention import FlashAttention4
from dit_sparse.kernels.measured import Query, device_class, measured_order
from dit_sparse.kernels.ops import Attended, AttentionCall, BlockMassCall
from dit_sparse.kernels.probe import ShapeClass
from dit_sparse.kernels.probe_mass import MassClass, mass_disagreement
from dit_sparse.mask import BlockMask


def call(
    dim: int = 128,
    block: tuple[int, int] | None = (128, 128),
    tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> AttentionCall:
    q = torch.zeros(1, tokens, 2, dim, dtype=dtype, device=device)
    mask = None if block is None else BlockMask.full(block, tokens, device)
    return AttentionCall(q, q, q, mask, None, 1.0)


# Missing packages and partners.


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets which of the optional distributions seem to be there."""
    real = importlib.metadata.distribution

    def pretend(*names: str) -> None:
        def distribution(name: str) -> object:
            if name in ("flash-attn-4", "fa3-fwd", "flash-attn-3"):
                if name in names:
                    return object()
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        ops._discover.cache_clear()

    yield pretend
    monkeypatch.undo()
    ops._discover.cache_clear()


def test_a_named_kernel_whose_package_is_missing_raises(installed: Callable[..., None]) -> None:
    installed()
    x = call()
    with pytest.raises(ops.Unsupported, match=r"'flash-attn-4' .* 'flash-attn-4' is not installed"):
        ops.attention(x.q, x.k, x.v, x.mask, impl="flash-attn-4")
    with pytest.raises(ops.Unsupported, match=r"'fa3-fwd' or 'flash-attn-3' is not installed"):
        ops.check_impl("flash-attn-3")


def test_any_of_the_packages_suffices(installed: Callable[..., None]) -> None:
    installed("flash-attn-3")
    names = [impl.name for impl in ops.implementations("attention")]
    assert "flash-attn-3" in names and "flash-attn-4" not in names


def test_a_named_kernel_leaves_other_operations_to_its_partner(
    installed: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    installed("flash-attn-4")
    assert ops._responsible("attention", "flash-attn-4") == "flash-attn-4"
    for op in ("row_lse", "block_mass", "summarize", "top_blocks"):
        assert ops._responsible(op, "flash-attn-4") == "triton"
        assert ops._responsible(op, "cpu") == "cpu"
    assert ops._responsible("row_lse", "auto") == "auto"
    half = call(64, None, 64, torch.float16)
    ops._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="dit_sparse.kernels.ops"):
        assert ops.select("row_lse", replace(half, v=None), "flash-attn-4").name == "triton"
    assert "by 'triton', for 'flash-attn-4', which has no row_lse" in caplog.text
    # The operation that it has is never left to another.
    ops._chosen.clear()
    x = call()
    refusal = "(?s)flash-attn-4: needs an NVIDIA device, got cpu.*impl='auto' asks the other"
    with pytest.raises(ops.Unsupported, match=refusal):
        ops.attention(x.q, x.k, x.v, x.mask, impl="flash-attn-4")


# Refusals.


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (call(dim=136), "head dim must be a multiple of 8 up to 128, got 136"),
        (call(dim=36), "multiple of 8 up to 128, got 36"),
        (call(dtype=torch.float32), "bfloat16 or float16, got torch.float32"),
        (call(block=(96, 128), tokens=192), "multiple of 64 tokens, got 96"),
        (call(block=(128, 32)), r"one tile of its kernel, \(64, 128\) tokens, got 32"),
        (call(block=(128, 256)), r"one tile of its kernel, \(64, 128\) tokens, got 256"),
        (replace(call(), scale=0.0), "scale must be positive, got 0.0"),
        (call(tokens=0, block=None), "no empty sequence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flash4_says_why_it_refuses(bad: AttentionCall, reason: str) -> None:
    (found,) = flash4_attention.static_reasons(bad)
    assert re.search(reason, found)


@pytest.mark.parametrize("block", [(64, 64), (128, 64), (64, 128), (128, 128), (256, 128), None])
@pytest.mark.parametrize("dim", [40, 64, 96, 128])
def test_flash4_takes_what_its_kernel_has_tiles_for(dim: int, block: tuple[int, int]) -> None:
    assert flash4_attention.static_reasons(call(dim, block)) == []


def test_flash3_is_dense_only() -> None:
    assert flash3_attention.static_reasons(call(block=None)) == []
    assert flash3_attention.static_reasons(call(dim=256, block=None)) == []
    masked = flash3_attention.static_reasons(call())
    padded = replace(call(block=None), key_valid=torch.ones(1, 256, dtype=torch.bool))
    assert masked == flash3_attention.static_reasons(padded) != []
    assert "multiple of 8 up to 256" in flash3_attention.static_reasons(call(260, None))[0]


LIBRARIES = [
    (FlashAttention3(), "9.x only"),
    (FlashAttention4(), "9.x only"),
    (CudnnAttention(), "9.0 and newer"),
]


class OnCuda(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda:0")  # type: ignore[assignment]


@pytest.mark.parametrize(("impl", "wanted"), LIBRARIES)
def test_kernels_of_libraries_ask_the_device_first_and_in_the_same_words(
    impl: ops.Impl, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = call(block=None, dtype=torch.float32)
    assert impl.reasons(x) == ["needs an NVIDIA device, got cpu"]
    x = replace(x, q=x.q.as_subclass(OnCuda))
    for older in ((7, 5), (8, 9)):
        monkeypatch.setattr(nvidia, "compute_capability", lambda device, found=older: found)
        found = f"{older[0]}.{older[1]}"
        assert impl.reasons(x) == [f"is used on compute capability {wanted}, got {found}"]
    monkeypatch.setattr(nvidia, "compute_capability", lambda device: (9, 0))
    assert impl.reasons(x)[0] == "dtype must be bfloat16 or float16, got torch.float32"
    monkeypatch.setattr(nvidia, "compute_capability", lambda device: (12, 0))
    refused = impl.reasons(x)[0] == "is used on compute capability 9.x only, got 12.0"
    assert refused == (wanted == "9.x only")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert impl.reasons(x) == ["needs an NVIDIA device, got cuda:0 of ROCm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a broken installation says")
def test_a_package_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cutlass", None)
    flash4_attention._library.cache_clear()
    reason = flash4_attention._library()
    flash4_attention._library.cache_clear()
    assert isinstance(reason, str) and "cannot be imported: ModuleNotFoundError" in reason


# The order.


def fake(name: str, rank: int, reasons: list[str]) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        precisions=("model",),
        priority=lambda call: rank,
        reasons=lambda call: reasons,
    )


@pytest.fixture
def line_up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str]]]:
    """The order in which ``auto`` asks made-up implementations on a made-up device."""

    def order(
        ranks: dict[str, int], measured_names: tuple[str, ...], refusing: tuple[str, ...] = ()
    ) -> list[tuple[str, str]]:
        impls = tuple(
            fake(name, rank, ["no"] if name in refusing else []) for name, rank in ranks.items()
        )
        monkeypatch.setattr(ops, "implementations", lambda op: impls)
        monkeypatch.setattr(ops, "_measured_query", lambda op, call: "query")
        monkeypatch.setattr(ops, "_device_class", lambda index: "h100-sm90")
        monkeypatch.setattr(ops, "measured_order", lambda device, query: measured_names)
        return [(impl.name, why) for impl, why in ops._candidates("attention", call())]

    return order


def test_measured_kernels_change_places_and_others_keep_theirs(
    line_up: Callable[..., list[tuple[str, str]]],
) -> None:
    ranks = {"reference": 0, "triton": 100, "flash-attn-4": 105, "cudnn": 110, "flash-attn-3": 120}
    names = [name for name, _ in line_up(ranks, ())]
    assert names == ["flash-attn-3", "cudnn", "flash-attn-4", "triton", "reference"]
    found = line_up(ranks, ("triton", "not installed", "cudnn"))
    assert [name for name, _ in found] == [
        "flash-attn-3", "triton", "flash-attn-4", "cudnn", "reference",
    ]  # fmt: skip
    assert [why for _, why in found] == [
        "by its rank", "as measured on h100-sm90", "by its rank", "as measured on h100-sm90",
        "by its rank",
    ]  # fmt: skip


def test_auto_goes_on_to_the_next_and_says_why_it_chose(
    line_up: Callable[..., list[tuple[str, str]]], caplog: pytest.LogCaptureFixture
) -> None:
    line_up({"triton": 100, "flash-attn-4": 105}, ("flash-attn-4", "triton"), ("flash-attn-4",))
    ops._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="dit_sparse.kernels.ops"):
        assert ops.select("attention", call()).name == "triton"
        assert ops.select("attention", call()).name == "triton"
    assert [r.getMessage() for r in caplog.records] == [
        "attention on cpu (torch.bfloat16) is computed by 'triton', as measured on h100-sm90"
    ]
    assert "attention as measured on h100-sm90" in ops.why_chosen("triton")
    assert ops.why_chosen("nobody") == ""
    ops._chosen.clear()


def test_priorities_where_nothing_was_measured() -> None:
    impl = FlashAttention4()
    long = call(tokens=8192, device="meta", block=None)
    mask = BlockMask(
        torch.empty(1, 1, 64, dtype=torch.int32, device="meta"),
        torch.empty(1, 1, 64, 64, dtype=torch.int32, device="meta"),
        (128, 128),
        (8192, 8192),
    )
    sparse = replace(long, mask=mask)
    triton, cudnn = 100, 110
    assert impl.priority(long) > cudnn
    assert impl.priority(sparse) < triton
    assert FlashAttention3.rank > impl.priority(long)


# Tables.


def row(backend: str, ms: float, **changed: object) -> dict[str, object]:
    fields = {
        "backend": backend, "op": "attention", "shape": "12x32768x128", "block": 128,
        "density": 0.25, "ms": ms, "config": None,
    }  # fmt: skip
    return {**fields, **changed}


def results(*rows: dict[str, object], name: str = "NVIDIA H100 80GB HBM3") -> dict[str, object]:
    return {"machine": {"name": name, "capability": "9.0"}, "rows": list(rows)}


def test_device_classes() -> None:
    assert device_class("NVIDIA H100 80GB HBM3", (9, 0)) == "h100-sm90"
    assert device_class("NVIDIA A100-SXM4-80GB", (8, 0)) == "a100-sm80"
    assert device_class("NVIDIA GeForce RTX 4090", (8, 9)) == "4090-sm89"
    assert device_class("Graphics Device", (9, 0)) == "unknown-sm90"


def test_a_table_orders_what_was_timed() -> None:
    table = make_table(
        [
            results(
                row("triton-pointer", 1.0),  # the TMA path counts
                row("triton-tma", 3.0),
                row("flash-attn-4", 2.0),
                row("triton-tma", 1.0, density=0.1),
                row("flash-attn-4", 2.0, density=0.1),
                row("triton-tma", 1.0, density=0.05),  # alone: no order
                row("triton-tma", 0.1, config="(128, 64, 4, 2)"),
                row("triton-tma", 0.1, op="tune"),
                row("triton-hopper", 3.0, block=[128, 64]),  # what Triton takes
                row("triton-tma", 1.0, block=[128, 64]),
                row("flash-attn-4", 2.0, block=[128, 64]),
                row("sdpa-flash", 0.1, block=None, density=1.0),
                row("sdpa-cudnn", 9.0, block=None, density=1.0),
                row("flash-attn-3", 8.0, block=None, density=1.0),
                row("triton", 1.0, op="zeroth, kernel"),
                row("flash-attn-4", 2.0, op="zeroth, kernel"),
            ),
            results(row("flash-attn-4", 0.5, density=0.1)),  # measured again
        ]
    )
    assert table["device"] == "h100-sm90"
    found = {(r[0], r[3], r[5]): r[6] for r in table["rows"]}
    assert found == {
        ("attention", (128, 128), 0.25): ["flash-attn-4", "triton"],
        ("attention", (128, 128), 0.1): ["flash-attn-4", "triton"],
        ("attention", (128, 64), 0.25): ["flash-attn-4", "triton"],
        ("attention", None, 1.0): ["flash-attn-3", "cudnn"],
        ("attention+summary", (128, 128), 0.25): ["triton", "flash-attn-4"],
    }


def test_a_table_is_of_one_known_machine() -> None:
    with pytest.raises(ValueError, match=r"one kind of machine, got \['a100-sm90', 'h100-sm90'\]"):
        make_table([results(), results(name="NVIDIA A100-SXM4-80GB")])
    with pytest.raises(ValueError, match=r"expected machine\.capability"):
        make_table([{"machine": {"name": "NVIDIA H100"}, "rows": []}])


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(measured, "TABLES", tmp_path)
    measured._rows.cache_clear()
    measured_order.cache_clear()
    yield tmp_path
    measured._rows.cache_clear()
    measured_order.cache_clear()


def test_a_written_table_is_looked_up(tables: Path) -> None:
    source = tables / "results.json"
    flash_first = [row("triton-tma", 2.0), row("flash-attn-4", 1.0)]
    triton_first = [
        row("triton-tma", 1.0, density=0.05),
        row("flash-attn-4", 2.0, density=0.05),
        row("triton-tma", 1.0, shape="48x16384x128"),
        row("flash-attn-4", 2.0, shape="48x16384x128"),
    ]
    source.write_text(json.dumps(results(*flash_first, *triton_first)))
    path = write_table([source], tables)
    assert path.name == "h100-sm90.json"
    assert len(path.read_text().splitlines()) < 30

    asked = Query("attention", "bfloat16", 128, (128, 128), 32_768.0, 0.3)
    flash, triton = ("flash-attn-4", "triton"), ("triton", "flash-attn-4")
    assert measured_order("h100-sm90", asked) == flash
    # The nearest density, as a ratio, at the nearest length.
    assert measured_order("h100-sm90", asked._replace(density=0.12)) == flash
    assert measured_order("h100-sm90", asked._replace(density=0.1)) == triton
    assert measured_order("h100-sm90", asked._replace(tokens=16_000.0)) == triton
    assert measured_order("h100-sm90", asked._replace(tokens=65_536.0)) == flash
    # Nothing comparable.
    for other in (
        {"tokens": 65_540.0}, {"tokens": 8_191.0}, {"dim": 64}, {"block": (64, 64)},
        {"block": None}, {"dtype": "float16"}, {"op": "attention+summary"},
    ):  # fmt: skip
        assert measured_order("h100-sm90", asked._replace(**other)) == ()
    assert measured_order("b200-sm100", asked) == ()


def test_a_table_of_another_format_is_refused(tables: Path) -> None:
    (tables / "x-sm90.json").write_text(json.dumps({"columns": ["op"], "rows": []}))
    with pytest.raises(ValueError, match="write it again"):
        measured_order("x-sm90", Query("attention", "bfloat16", 64, None, 1.0, 1.0))


def test_shipped_tables_name_known_implementations() -> None:
    known = {impl.name for impl in ops.implementations("attention")} | {"flash-attn-3", "cudnn"}
    for path in measured.TABLES.glob("*.json"):
        for _, order in measured._rows(path.stem):
            assert set(order) <= known | {"flash-attn-4", "triton"} and len(order) > 1


def test_the_density_asked_for_is_a_bound_on_the_host() -> None:
    x = call(tokens=1024, block=(128, 128))
    x = replace(x, q=_CudaLooking(x.q))
    assert x.mask is not None
    keep = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    keep[..., :2] = True
    packed = BlockMask.from_dense(keep, 128, 1024).pack()
    packed = replace(packed, longest=2)
    for mask, density in ((x.mask, 1.0), (packed, 0.25), (packed.lists(), 0.25), (None, 1.0)):
        query = ops._measured_query("attention", replace(x, mask=mask))
        block = None if mask is None else (128, 128)
        assert query == Query("attention", "bfloat16", 128, block, 1024.0, density)
    assert ops._measured_query("attention", call()) is None


class _CudaLooking:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype


# The test before use.


def right(x: AttentionCall) -> Attended:
    assert x.v is not None
    return ops.attention(
        x.q, x.k, x.v, x.mask, key_valid=x.key_valid, scale=x.scale, impl="reference"
    )


def ignores_lists(x: AttentionCall) -> Attended:
    return right(replace(x, mask=None, k=x.k.nan_to_num(), v=x.v.nan_to_num()))


def ignores_padding(x: AttentionCall) -> Attended:
    return right(replace(x, key_valid=None, k=x.k.nan_to_num(), v=x.v.nan_to_num()))


def binary_logarithm(x: AttentionCall) -> Attended:
    found = right(x)
    return Attended(found.out, found.lse / torch.log(torch.tensor(2.0)))


def first_mask_for_all(x: AttentionCall) -> Attended:
    dense = x.mask.dense()
    mask = BlockMask.from_dense(dense[:1, :1], x.mask.block, x.mask.seq)
    return right(replace(x, mask=mask, k=x.k.nan_to_num(), v=x.v.nan_to_num()))


def reads_past_the_end(x: AttentionCall) -> Attended:
    more = [torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (x.k, x.v)]
    mask = BlockMask.from_dense(x.mask.dense(), x.mask.block, (x.q.shape[1], more[0].shape[1]))
    return right(replace(x, k=more[0], v=more[1], mask=mask))


def fills_empty_rows(x: AttentionCall) -> Attended:
    found = right(x)
    empty = (found.lse == float("-inf")).transpose(1, 2).unsqueeze(-1)
    return Attended(found.out.masked_fill(empty, 1.0), found.lse)


def raises(x: AttentionCall) -> Attended:
    raise RuntimeError("no kernel image")


KIND = ShapeClass(torch.device("cpu"), torch.float16, 32, (128, 128))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block", [None, (64, 64), (128, 128), (256, 128)])
def test_a_right_kernel_passes(block: tuple[int, int] | None, padded: bool) -> None:
    for shared in ((False, False), (True, True)) if block else ((False, False),):
        kind = replace(KIND, block=block, shared=shared, padded=padded)
        example = kind.example()
        assert ShapeClass.of(example) == kind
        assert probe.disagreement(right, kind) is None
        if block is not None:
            assert (right(example).lse == float("-inf")).any(), "no query without keys"


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (ignores_lists, KIND),
        (first_mask_for_all, KIND),
        (binary_logarithm, KIND),
        (binary_logarithm, replace(KIND, block=None)),
        (reads_past_the_end, KIND),
        (fills_empty_rows, KIND),
        (ignores_padding, replace(KIND, block=None, padded=True)),
        (ignores_padding, replace(KIND, padded=True)),
        (raises, KIND),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_kernel_is_found_and_reported_once(
    wrong: Callable[[AttentionCall], Attended], kind: ShapeClass, caplog: pytest.LogCaptureFixture
) -> None:
    probe.probe.cache_clear()
    with caplog.at_level(logging.WARNING, logger="dit_sparse.kernels.probe"):
        reasons = {probe.probe("broken", wrong, kind) for _ in range(2)}
    (reason,) = reasons
    assert reason is not None and reason.startswith("failed the test of this kind of call")
    assert len(caplog.records) == 1 and "broken is not used" in caplog.text
    if wrong is raises:
        assert "RuntimeError: no kernel image" in reason
    probe.probe.cache_clear()


MASS = MassClass(torch.device("cpu"), torch.float16, 16, (128, 64))


def right_mass(x: BlockMassCall) -> Tensor:
    return ops.block_mass(
        x.q, x.k, x.lse, x.block, key_valid=x.key_valid, scale=x.scale, impl="reference"
    )


def mass_with_other_scale(x: BlockMassCall) -> Tensor:
    return right_mass(replace(x, scale=1.001 * x.scale))


def mass_of_padded_keys(x: BlockMassCall) -> Tensor:
    return right_mass(replace(x, k=x.k.nan_to_num(), key_valid=None))


def mass_of_empty_rows(x: BlockMassCall) -> Tensor:
    return right_mass(replace(x, lse=x.lse.nan_to_num(neginf=8.0)))


def mass_of_later_keys_lost(x: BlockMassCall) -> Tensor:
    found = right_mass(x)
    found[..., -1] = 0
    return found


def mass_of_one_group(x: BlockMassCall) -> Tensor:
    return right_mass(replace(x, block=(64, 64)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block", [(16, 64), (32, 64), (64, 64), (128, 64), (128, 128)])
def test_a_right_block_mass_passes(block: tuple[int, int], padded: bool) -> None:
    kind = replace(MASS, block=block, padded=padded)
    example = kind.example()
    assert MassClass.of(example) == kind
    assert (example.lse == float("-inf")).any(), "no query without keys"
    assert mass_disagreement(right_mass, kind) is None


@pytest.mark.parametrize(
    "wrong",
    [
        mass_with_other_scale,
        mass_of_padded_keys,
        mass_of_empty_rows,
        mass_of_later_keys_lost,
        mass_of_one_group,
    ],
)
def test_a_wrong_block_mass_is_found(wrong: Callable[[BlockMassCall], Tensor]) -> None:
    assert mass_disagreement(wrong, replace(MASS, padded=True)) is not None
