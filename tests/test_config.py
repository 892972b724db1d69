"""Settings: their JSON form, and what is refused with which words."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.config import VERSION, SparseConfig
from dit_sparse.kernels import ops
from dit_sparse.methods import list_methods
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.compensated_delta import CompensatedDelta
from dit_sparse.methods.dense import FullMask
from dit_sparse.processors.processor import SparseProcessor


@pytest.mark.parametrize("name", sorted(list_methods()))
def test_json_round_trip_of_every_method(name: str, tmp_path: Path) -> None:
    kind = list_methods()[name]
    for method in (kind(), kind.exact()):
        config = SparseConfig(
            method, dense_layers=(0, 7), impl="reference", attention_precision="fp8_qkpv"
        )
        config.save(tmp_path / "config.json")
        loaded = SparseConfig.load(tmp_path / "config.json")
        assert loaded == config
        assert type(loaded.method) is kind
        assert loaded != SparseConfig(method)


@pytest.mark.parametrize("tile", [None, (2, 4, 8)])
def test_json_round_trip_of_every_adaspa_option(tile: tuple[int, int, int] | None) -> None:
    method = AdaSpa(0.75, (0, 30), 128, tile, head_adaptive=False, lse_cache=False, staleness=0.5)
    config = SparseConfig(method)
    loaded = SparseConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert loaded == config
    # Equal also where == does not look: 0 and 0.0 are different search points.
    assert [type(point) for point in loaded.method.search] == [int, int]
    assert hash(loaded.method) == hash(method)


def test_saved_form_is_versioned_and_readable(tmp_path: Path) -> None:
    SparseConfig(FullMask(128)).save(tmp_path / "full.json")
    assert json.loads((tmp_path / "full.json").read_text()) == {
        "version": VERSION,
        "method": {"name": "full", "block": 128},
        "dense_layers": [],
        "impl": "auto",
        "dense_padding": "keep",
        "strict": False,
        "attention_precision": "model",
    }


def test_from_name_sorts_options_to_method_and_config() -> None:
    config = SparseConfig.from_name("adaspa", sparsity=0.7, dense_layers=[1, 2], impl="cpu")
    assert config == SparseConfig(AdaSpa(sparsity=0.7), (1, 2), "cpu")


def good() -> dict[str, Any]:
    return SparseConfig().to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, ["config accepts", "dense_layers", "impl", "colour"]),
        ({"version": 99}, [f"version must be {VERSION}", "99"]),
        ({"version": None}, [f"version must be {VERSION}", "None"]),
        (
            {"method": {"name": "adaspa", "sparcity": 0.8}},
            ["method 'adaspa' accepts", "'sparsity'", "'head_adaptive'", "sparcity"],
        ),
        ({"method": {"name": "adaspo"}}, ["'adaspo'", "Did you mean 'adaspa'", *list_methods()]),
        ({"method": {}}, ["method must be one of", *list_methods()]),
        ({"method": "adaspa"}, ["'method'", "{'name': ...}"]),
        (
            {"attention_precision": "int8"},
            ["attention_precision must be one of", "'fp8_qk'", "'int8'"],
        ),
        ({"dense_padding": "drop"}, ["dense_padding must be 'keep' or 'trim'", "'drop'"]),
        ({"impl": "cuda"}, ["impl must be 'auto' or one of", "reference", "cpu", "'cuda'"]),
        ({"dense_layers": [-1]}, ["dense_layers must be ints >= 0", "-1"]),
        ({"method": {"name": "adaspa", "sparsity": 1.0}}, ["[0, 1)", "1.0"]),
        ({"method": {"name": "adaspa", "sparsity": "0.8"}}, ["sparsity must be a number"]),
        ({"method": {"name": "adaspa", "block": 32}}, ["block must be 64 or 128", "32"]),
        ({"method": {"name": "adaspa", "tile": [4, 4]}}, ["tile must be", "(4, 4)"]),
        ({"method": {"name": "adaspa", "staleness": 0}}, ["staleness must be positive"]),
        ({"method": {"name": "adaspa", "search": [0.6, 0.2]}}, ["search must ascend"]),
    ],
)
def test_wrong_settings_are_refused_with_the_accepted_ones(
    change: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        SparseConfig.from_dict(good() | change)
    for word in words:
        assert word in str(error.value)


def test_a_name_in_place_of_a_method_points_to_from_name() -> None:
    with pytest.raises(ValueError, match="from_name"):
        SparseConfig("adaspa")  # type: ignore[arg-type]


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        SparseConfig.load(path)
    with pytest.raises(FileNotFoundError):
        SparseConfig.load(tmp_path / "absent.json")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernel discovery as on a machine that has no triton."""
    concrete = ops._concrete
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [n for n in sys.modules if n.startswith("dit_sparse.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    # Classes that an earlier test imported live on.
    monkeypatch.setattr(
        ops, "_concrete", lambda kind: [k for k in concrete(kind) if k.name != "triton"]
    )
    ops._discover.cache_clear()
    yield
    ops._discover.cache_clear()


@pytest.mark.usefixtures("without_triton")
def test_a_missing_optional_package_is_named() -> None:
    with pytest.raises(ops.Unsupported, match=r"impl='triton' .*package 'triton' is not installed"):
        SparseConfig(impl="triton")
    with pytest.raises(ValueError, match=r"one of \[.*'cpu'.*'reference', 'triton'\]"):
        SparseConfig(impl="nothing")
    assert SparseConfig(impl="cpu").impl == "cpu"


def test_processor_takes_every_form_of_a_config(tmp_path: Path) -> None:
    config = SparseConfig(AdaSpa(sparsity=0.5), (3,))
    path = tmp_path / "saved.json"
    config.save(path)
    assert SparseProcessor(str(path)).config == config
    assert SparseProcessor(path).config == config
    assert SparseProcessor(config).config is config
    assert SparseProcessor(config.method).config == SparseConfig(config.method)
    assert SparseProcessor("adaspa", sparsity=0.5, dense_layers=(3,)).config == config
    assert SparseProcessor(density=0.5, dense_layers=(3,)).config == SparseConfig(
        CompensatedDelta(0.5), (3,)
    )
    assert SparseProcessor().config == SparseConfig()


def test_processor_refuses_options_beside_an_object(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    SparseConfig().save(path)
    for given in (SparseConfig(), AdaSpa(), path, str(path)):
        with pytest.raises(ValueError, match=r"options \['sparsity'\] go with a method name"):
            SparseProcessor(given, sparsity=0.5)
    with pytest.raises(ValueError, match="config must be a method name"):
        SparseProcessor(3)  # type: ignore[arg-type]


def test_an_option_of_another_method_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"'strict'.*unknown \['sparsity'\]; .* 1 - sparsity"):
        SparseConfig.from_name("compensated_delta", sparsity=0.8)
    with pytest.raises(ValueError, match=r"unknown \['stric'\]$"):
        SparseConfig.from_name("compensated_delta", stric=True)
    with pytest.raises(ValueError, match="tile must be"):
        SparseConfig.from_name("compensated_delta", tile=4)
