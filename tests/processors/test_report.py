"""What a generation did, by layer and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.kernels import ops
from dit_sparse.methods.base import Call
from dit_sparse.processors.run import stored_bytes

KEYS = {
    "layer",
    "name",
    "model",
    "branch",
    "phases",
    "last_phase",
    "kernels",
    "head_density",
    "search_seconds",
    "cache_bytes",
}
SETTINGS = {"sparsity": 0.5, "search": (2, 4)}


def test_every_layer_and_branch_has_an_entry_with_all_keys(clip: Any) -> None:
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", dense_layers=(1,), **SETTINGS) as sparse:
        run(steps=5)
        report = sparse.report()
    assert [(e["branch"], e["layer"], e["name"]) for e in report.layers] == [
        (branch, layer, f"blocks.{layer}.attn1")
        for branch in ("cond", "uncond")
        for layer in (0, 1)
    ]
    for entry in report.layers:
        assert set(entry) == KEYS
        if entry["layer"] == 1:
            assert entry["phases"] == {"dense": 5} and entry["kernels"] == {"own": 5}
            assert entry["head_density"] is None
            assert entry["search_seconds"] == entry["cache_bytes"] == 0
        else:
            assert entry["phases"] == {"dense": 1, "search": 1, "sparse": 2, "refresh": 1}
            assert entry["last_phase"] == "sparse"
            assert entry["kernels"] == {"own": 2, "cpu": 3}
            assert entry["head_density"] == [0.5, 0.5]
            assert entry["search_seconds"] > 0 and entry["cache_bytes"] > 0


def test_totals_are_those_of_the_layers(clip: Any) -> None:
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=5)
        report = sparse.report()
    layers = report.layers
    assert report.search_seconds == pytest.approx(sum(e["search_seconds"] for e in layers))
    assert 0 < report.search_seconds < report.attention_seconds
    # No tensor is shared between layers here.
    assert report.cache_bytes == sum(e["cache_bytes"] for e in layers)
    assert report.kernels == {"own": 8, "cpu": 12}


def test_why_kernels_were_chosen(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_chosen", {})
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=5)
        report = sparse.report()
    # The model's own attention is nobody's choice.
    assert set(report.choices) == {"cpu"}
    assert "attention by its rank" in report.choices["cpu"]
    assert f"cpu: {report.choices['cpu']}" in " ".join(report.table(1000).split())
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS, impl="cpu") as sparse:
        run(steps=5)
        assert "attention as named" in sparse.report().choices["cpu"]


def test_cache_bytes_are_what_the_layer_keeps(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        model(**inputs())
        memory = sparse.bindings[0].run.branches["call"].memory
        for entry in sparse.report().layers:
            tensors = [v for v in memory[entry["layer"]].values() if isinstance(v, torch.Tensor)]
            # The LSE of every fourth row, 4 bytes a row and head, and a mask beside it.
            assert sum(t.numel() * t.element_size() for t in tensors) == 64 * 2 * 4
            assert 64 * 2 * 4 < entry["cache_bytes"] == stored_bytes(memory[entry["layer"]])


def test_stored_bytes_count_storage_once_wherever_it_lies() -> None:
    whole = torch.zeros(10, dtype=torch.float64)
    assert stored_bytes({"a": whole}) == 80
    # A view keeps all of its storage alive.
    assert stored_bytes({"a": whole[:1], "b": [whole, (whole[3:],)], "c": "text", "d": None}) == 80
    assert stored_bytes([{"x": whole}, {"y": whole.clone()}]) == 160
    assert stored_bytes({}) == 0


def test_density_is_achieved_per_head_and_over_all_calls(
    wan: Any, inputs: Any, calls: list[Call]
) -> None:
    # Ragged: 105 tokens in blocks of 64 and 41. Keeping one block of two is not half of the pairs.
    model = wan(num_attention_heads=4)
    with enable_sparse_attention(
        model, "adaspa", sparsity=0.5, search=(0,), head_adaptive=False
    ) as sparse:
        for t in (900.0, 500.0):
            model(**inputs(t, frames=3, size=(10, 14)))
        report = sparse.report()
    sparse_calls = [c for c in calls if c.head_density is not None]
    assert len(sparse_calls) == 2
    for entry, call in zip(report.layers, sparse_calls, strict=True):
        assert entry["head_density"] == pytest.approx(call.head_density[0].tolist())
        assert len(entry["head_density"]) == 4
        possible = [(64 * a + 41 * b) / 105**2 for a in (64, 41) for b in (64, 41)]
        for density in entry["head_density"]:
            assert any(density == pytest.approx(value) for value in possible)
    mean = sum(sum(e["head_density"]) / 4 for e in report.layers) / 2
    assert report.sparse_density == pytest.approx(mean)
    assert report.density == pytest.approx((1 + mean) / 2)


def test_a_mask_shared_by_all_heads_is_reported_for_each(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "full") as sparse:
        model(**inputs())
    assert [e["head_density"] for e in sparse.report().layers] == [[1.0, 1.0]] * 2


def test_before_anything_and_after_removal(wan: Any, inputs: Any) -> None:
    sparse = SparseProcessor("adaspa", sparsity=0.5, search=(0,))
    empty = sparse.report()
    assert empty.layers == [] and empty.density == 1.0 and "nothing yet" in str(empty)
    model = wan()
    with sparse:
        model.set_attn_processor(sparse)
        model(**inputs(900.0))
        model(**inputs(500.0))
        inside = sparse.report()
    assert sparse.report() == inside and inside.sparse_density == 0.5


def test_the_log_is_that_of_the_last_generation(clip: Any) -> None:
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=5)
        run(steps=3, guidance_scale=1.0)
        layers = sparse.report().layers
    assert [e["branch"] for e in layers] == ["cond", "cond"]
    assert sum(layers[0]["phases"].values()) == 3


def test_summary_is_one_line_and_the_table_has_a_row_for_each_layer(clip: Any, wan: Any) -> None:
    run = clip(second=wan(seed=1), boundary_ratio=0.8)
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=6)
        report = sparse.report()
    summary = str(report)
    assert "\n" not in summary and f"{report.sparse_density:.3f} on sparse calls" in summary
    table = report.table(width=200)
    assert summary in table
    for number in (0, 1):
        for layer in (0, 1):
            for branch in ("cond", "uncond"):
                name = f"{number}: blocks.{layer}.attn1"
                rows = [line for line in table.splitlines() if name in line and branch in line]
                # "uncond" contains "cond".
                assert len(rows) == (2 if branch == "cond" else 1)
                assert "50 50" in rows[-1] and "0.500" in rows[-1] and "cpu x" in rows[-1]
    assert max(len(line) for line in table.splitlines()) <= 200
    assert "\x1b" not in table
    assert max(len(line) for line in report.table(width=80).splitlines()) <= 80


def test_kernels_are_those_that_computed(wan: Any, inputs: Any, monkeypatch: Any) -> None:
    model = wan()
    asked: list[str] = []
    select = ops.select
    monkeypatch.setattr(ops, "select", lambda op, *a: asked.append(op) or select(op, *a))
    reuse = {"density": 0.0, "summary": "drop", "refresh": "never", "warmup": 1}
    for options, kernel in (({"density": 0.5}, "cpu"), ({}, "none")):
        with enable_sparse_attention(model, "compensated_delta", **(reuse | options)) as sparse:
            model(**inputs(900.0))
            asked.clear()
            model(**inputs(500.0))
            # Asked for the computation alone, once a layer.
            assert asked.count("attention") == (2 if kernel == "cpu" else 0)
            for entry in sparse.report().layers:
                assert entry["kernels"] == {"own": 1, kernel: 1}


def test_memory_that_a_layer_lets_go_of_still_counts(wan: Any, inputs: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        for timestep in (900.0, 500.0):
            model(**inputs(timestep))
        before = [entry["cache_bytes"] for entry in sparse.report().layers]
        for memory in sparse.bindings[0].run.branches["call"].memory.values():
            memory.clear()
        report = sparse.report()
    assert min(before) > 0 and [entry["cache_bytes"] for entry in report.layers] == before
    assert report.cache_bytes == sum(before)
