"""What `--methods` accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_sparse import AdaSpa, SparseConfig
from dit_sparse.eval.arms import parse_arms, split_entries
from dit_sparse.methods.dense import Dense, FullMask


def test_all_kinds_of_entries(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    SparseConfig.from_name("adaspa", sparsity=0.5, dense_layers=(0,)).save(path)
    arms = parse_arms(f"noise-floor, adaspa,adaspa:sparsity=0.6:search=(0.1,0.5),{path}")
    assert [arm.label for arm in arms] == [
        "dense",
        "noise-floor",
        "adaspa",
        "adaspa:sparsity=0.6:search=(0.1,0.5)",
        str(path),
    ]
    assert arms[0].is_dense and not arms[1].is_dense
    assert arms[0].config.method == Dense()
    assert arms[1].config.method == FullMask()
    assert arms[2].config.method == AdaSpa()
    assert arms[3].config.method == AdaSpa(sparsity=0.6, search=(0.1, 0.5))
    assert arms[4].config == SparseConfig.load(path)
    assert [arm.slug for arm in arms][2:] == [
        "adaspa",
        "adaspa-sparsity=0.6-search=-0.1-0.5",
        "mine.json",
    ]


def test_dense_is_always_first_and_once() -> None:
    assert [arm.label for arm in parse_arms("adaspa,dense")] == ["dense", "adaspa"]


def test_values_and_shared_options() -> None:
    config = parse_arms("adaspa:head_adaptive=false:tile=none:dense_layers=(0,1)")[1].config
    assert config.method == AdaSpa(head_adaptive=False, tile=None)
    assert config.dense_layers == (0, 1)


def test_split_keeps_brackets() -> None:
    assert split_entries("a:b=(1,2), c:d=[3,4],,e") == ["a:b=(1,2)", "c:d=[3,4]", "e"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaspaa", r"out of adaspa, .*dense, .*noise-floor, .*did you mean 'adaspa'"),
        ("adaspa:sparsty=0.8", r"out of \['sparsity'.*did you mean 'sparsity'"),
        ("adaspa:sparsity=1.5", "sparsity=1.5: sparsity is the share"),
        ("adaspa:sparsity=much", "must be a number"),
        ("adaspa:sparsity", "option=value"),
        ("adaspa:sparsity=0.1:sparsity=0.2", "once"),
        ("adaspa:impl=warp", "impl"),
        ("noise-floor:block=64", "without options"),
        ("absent.json", "not a file"),
        ("adaspa,adaspa", "twice"),
        (" , ", "at least one method"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(text)


def test_broken_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        parse_arms(str(path))
