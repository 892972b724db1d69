"""torch.compile: as many graphs as upstream, the same results, decisions still taken per step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx import GraphModule

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.methods.base import Call

SETTINGS = {"sparsity": 0.5, "search": (2, 3)}
PHASES = ["dense", "search", "refresh", "sparse"]
STEPS = (900.0, 700.0, 500.0, 300.0)


class Counter:
    """A compiler that hands graphs to ``backend`` and counts those of the model.

    The hook that reads the forward arguments may be traced by itself; with dynamic shapes its
    arithmetic on them is a graph, which is not counted.
    """

    def __init__(self, backend: str) -> None:
        self.backend = lookup_backend(backend)
        self.graphs = 0

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Any:
        self.graphs += any(
            "self_attention" in str(n) or "linear" in str(n) for n in graph.graph.nodes
        )
        return self.backend(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # The dispatcher of older versions of diffusers asks for torch's version. Torch 2.9 does not
        # say whose function it is.
        whose = r".*lru_cache.*(attention_dispatch|wrapped function\. )"
        warnings.filterwarnings("ignore", whose, UserWarning)
        yield
    torch.compiler.reset()


def generation(model: Any, inputs: Any, **options: Any) -> list[Tensor]:
    return [model(**inputs(t, **options))[0] for t in STEPS]


def graphs_of_upstream(build: Any, inputs: Any, compile_: Any) -> list[int]:
    """Graphs after one resolution and after a second, without sparse attention."""
    counter = Counter("eager")
    model = compile_(build(), counter)
    counts = []
    for options in ({}, {"size": (24, 16)}):
        generation(model, inputs, **options)
        counts.append(counter.graphs)
    torch.compiler.reset()
    return counts


def whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def regional(model: Any, backend: Any) -> Any:
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize(
    ("compile_", "layers", "backend"),
    [(whole, 2, "eager"), (regional, 12, "eager"), (regional, 2, "aot_eager")],
    ids=["whole", "regional", "regional aot"],
)
def test_graphs_are_as_many_as_upstream_and_results_as_eager(
    compile_: Any, layers: int, backend: str, wan: Any, inputs: Any, calls: list[Call]
) -> None:
    expected_graphs = graphs_of_upstream(lambda: wan(num_layers=layers), inputs, compile_)
    model = wan(num_layers=layers)
    with enable_sparse_attention(model, "adaspa", **SETTINGS):
        expected = [
            generation(model, inputs, **options) for options in ({}, {"size": (24, 16)}, {})
        ]
    calls.clear()

    counter = Counter(backend)
    sparse = enable_sparse_attention(model, "adaspa", **SETTINGS)
    compiled = compile_(model, counter)
    graphs = []
    for options, results in zip(({}, {"size": (24, 16)}, {}), expected, strict=True):
        for out, result in zip(generation(compiled, inputs, **options), results, strict=True):
            assert torch.equal(out, result)
        graphs.append(counter.graphs)
    assert graphs == [*expected_graphs, expected_graphs[-1]]
    # All steps of all layers, each with the decision of its own step.
    for layer in range(layers):
        assert [c.phase.value for c in calls if c.layer == layer] == PHASES * 3
    assert sparse.report().sparse_density == 0.5


@pytest.mark.parametrize("compile_", [whole, regional])
def test_a_compiled_pipeline_keeps_its_branches_apart(
    compile_: Any, clip: Any, calls: list[Call]
) -> None:
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        expected = run(steps=4)
        calls.clear()
        run.pipe.transformer = compile_(run.pipe.transformer, "eager")
        assert torch.equal(run(steps=4), expected)
        assert torch.equal(run(steps=4), expected)
    assert {c.step.branch for c in calls} == {"cond", "uncond"}
    first = [c.phase.value for c in calls if (c.layer, c.step.branch) == (0, "cond")]
    assert first == PHASES * 2


def test_sparse_attention_comes_and_goes_on_a_compiled_model(
    wan: Any, inputs: Any, calls: list[Call]
) -> None:
    model = wan()
    upstream = generation(model, inputs)
    compiled = whole(model, "eager")
    assert torch.equal(compiled(**inputs(900.0))[0], upstream[0])
    sparse = SparseProcessor("adaspa", **SETTINGS)
    compiled.set_attn_processor(sparse)
    outs = generation(compiled, inputs)
    assert [c.phase.value for c in calls if c.layer == 0] == PHASES
    assert torch.equal(outs[1], upstream[1]) and not torch.equal(outs[3], upstream[3])
    sparse.remove()
    for out, reference in zip(generation(compiled, inputs), upstream, strict=True):
        assert torch.equal(out, reference)
    assert len(calls) == 2 * len(STEPS)


def test_enabling_finds_the_model_inside_a_compiled_component(
    clip: Any, inputs: Any, calls: list[Call]
) -> None:
    run = clip()
    model = run.pipe.transformer
    run.pipe.transformer = whole(model, "eager")
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        assert [binding.model for binding in sparse.bindings] == [model]
        run(steps=3)
    with enable_sparse_attention(run.pipe.transformer, "adaspa", **SETTINGS) as sparse:
        assert [binding.model for binding in sparse.bindings] == [model]
    assert len(calls) == 12


def test_the_operator_is_registered_as_the_compiler_expects(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "full") as sparse:
        model(**inputs(500.0))
        site = sparse.bindings[0].sites[0]
        q = torch.randn(2, 2, 256, 12).transpose(1, 2)
        now, layout = torch.tensor([500.0]), torch.tensor([4, 8, 8, 0, 0])
        arguments = (q, q, q, None, site.handle, now, layout, None, None, False)
        torch.library.opcheck(
            torch.ops.dit_sparse.self_attention.default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
    assert torch.Tag.cudagraph_unsafe in torch.ops.dit_sparse.self_attention.default.tags
