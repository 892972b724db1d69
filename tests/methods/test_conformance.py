"""What every method must do, found by its being registered."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from dit_sparse.config import SparseConfig
from dit_sparse.methods import Method, list_methods, method_class

METHODS = list_methods()
SHAPES: list[dict[str, Any]] = [
    {},
    {"text": 5, "order": "text_video", "batch": 2},
    {"grid": (3, 5, 7), "text": 11, "heads": 3},
    {"grid": (1, 9, 9)},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_exact_settings_equal_dense_attention(name: str, shape: dict, make: Any) -> None:
    method, memory, shared = METHODS[name].exact(), {}, {}
    for index in range(4):
        data = make(**shape, seed=index)
        call = data.call(index, memory, total=4)
        call.shared = shared
        out = method.attend(call)
        assert (out - data.attention()).abs().max() < 1e-10
        assert out.shape == data.q.shape
        assert out.dtype == data.q.dtype


@pytest.mark.parametrize("name", sorted(METHODS))
def test_exact_settings_equal_dense_attention_beside_padding(name: str, make: Any) -> None:
    method, memory, shared = METHODS[name].exact(), {}, {}
    for index in range(3):
        data = make(text=9, batch=2, seed=index)
        data.key_valid = torch.ones(2, data.layout.tokens, dtype=torch.bool)
        data.key_valid[1, -6:] = False
        data.k[1, -6:] = data.v[1, -6:] = float("nan")
        call = data.call(index, memory, total=3)
        call.shared = shared
        out = method.attend(call)
        assert (out - data.attention()).abs().max() < 1e-10


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_are_frozen_dataclasses_of_plain_settings(name: str) -> None:
    kind = METHODS[name]
    assert issubclass(kind, Method)
    assert kind.name == name
    assert method_class(name) is kind
    method = kind()
    assert method == kind()
    assert hash(method) == hash(kind())
    assert type(kind.exact()) is kind
    for f in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, f.name, getattr(method, f.name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1  # type: ignore[attr-defined]


def test_every_concrete_method_class_has_a_name_of_its_own() -> None:
    def concrete(kind: type[Method]) -> list[type[Method]]:
        own = [] if kind.__abstractmethods__ else [kind]
        return own + [leaf for child in kind.__subclasses__() for leaf in concrete(child)]

    # A set: a class with two bases is found below both.
    kinds = {k for k in concrete(Method) if k.__module__.startswith("dit_sparse.")}
    assert sorted(k.name for k in kinds) == sorted(METHODS)
    assert {"adaspa", "dense", "full"} <= set(METHODS)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_survive_a_config_round_trip(name: str) -> None:
    for method in (METHODS[name](), METHODS[name].exact()):
        data = json.loads(json.dumps(SparseConfig(method).to_dict()))
        assert SparseConfig.from_dict(data).method == method
