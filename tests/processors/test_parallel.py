"""Several devices, played by processes on the CPU: what ``parallel_checks.py`` lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_checks import CHECKS
from tiny_models import tiny_models

from dit_sparse import context_parallel_plan, enable_sparse_attention
from dit_sparse.layout import TokenLayout
from dit_sparse.processors.balance import busiest, by_cost, in_order
from dit_sparse.processors.checks import split_models
from dit_sparse.processors.family import family_of
from dit_sparse.processors.ulysses import TokenSplit, even_parts, model_order

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
# With four processes one model of one stream and one of two, of which no length is divisible.
ON_FOUR = ("wan", "flux_uneven")
TINY = {tiny.name: tiny for tiny in tiny_models()}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: Any) -> Callable[[int, str], list[str]]:
    """What came out of a check with so many processes, one traceback each or ""; runs them once."""
    results: dict[int, list[dict[str, str]]] = {}

    def start(size: int) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp(f"devices{size}")
        names = CHECKS if size == 2 else ON_FOUR
        path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        arguments = [str(size), str(folder), ",".join(names)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "parallel_checks.py"), str(rank), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            said = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(said)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]

    def of(size: int, name: str) -> list[str]:
        if size not in results:
            results[size] = start(size)
        return [result[name] for result in results[size]]

    return of


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_devices(name: str, outcome: Any) -> None:
    assert not any(outcome(2, name)), "\n".join(outcome(2, name))


@pytest.mark.parametrize("name", ON_FOUR)
def test_on_four_devices(name: str, outcome: Any) -> None:
    assert not any(outcome(4, name)), "\n".join(outcome(4, name))


@pytest.mark.parametrize(("streams", "size"), [((10, 7), 2), ((7, 12, 5), 3), ((4, 9), 4)])
def test_pieces_come_together_in_the_models_order(streams: tuple[int, ...], size: int) -> None:
    split = TokenSplit(streams, size)
    parts = torch.arange(sum(streams)).split(list(streams))
    held = [torch.cat([part.tensor_split(size)[rank] for part in parts]) for rank in range(size)]
    assert split.tokens == [len(tokens) for tokens in held]
    order = model_order(split, torch.device("cpu"))
    together = torch.cat(held)[None]
    assert order is not None
    assert torch.equal(order.apply(together)[0], torch.arange(sum(streams)))
    assert torch.equal(order.undo(order.apply(together)), together)


def test_one_stream_is_in_order() -> None:
    cpu = torch.device("cpu")
    assert model_order(TokenSplit((11,), 3), cpu) is None
    assert model_order(TokenSplit((0, 11), 3), cpu) is None
    assert even_parts(11, 3) == [4, 4, 3]


def test_heads_by_cost() -> None:
    assert in_order(5, 2) == ((0, 1, 2), (3, 4))
    with pytest.raises(ValueError, match=r"got 3 heads for 4 devices; use an ulysses_degree of 3"):
        in_order(3, 4)
    assert by_cost([9, 9, 1, 1], 2) == ((0, 2), (1, 3))
    # Nothing to gain, or next to nothing.
    assert by_cost([1, 1, 1, 1], 2) == ((0, 1), (2, 3))
    assert by_cost([100, 101, 100, 100], 2) == ((0, 1), (2, 3))
    rng = torch.Generator().manual_seed(0)
    for count, size in ((40, 8), (24, 4), (13, 3)):
        cost = torch.rand(count, generator=rng).tolist()
        heads = by_cost(cost, size)
        assert sorted(head for own in heads for head in own) == list(range(count))
        assert [len(own) for own in heads] == even_parts(count, size)
        assert busiest(cost, heads) <= busiest(cost, in_order(count, size))
        if count % size == 0:
            assert busiest(cost, heads) < 1.1 * sum(cost) / size


def test_streams() -> None:
    def streams(name: str, numbers: list[int], layout: TokenLayout) -> tuple[int, ...]:
        model = TINY[name].build()
        return family_of(model).streams(model, numbers, layout)

    around = TokenLayout.around((2, 3, 4), 5, 6)
    numbers = [2, 3, 4, 5, 6]
    assert streams("WanTransformer3DModel", numbers, around) == (35,)
    assert streams("QwenImageTransformer2DModel", numbers, around) == (5, 30)
    assert streams("FluxTransformer2DModel", [5], around) == (5, 30)
    last = TokenLayout((2, 3, 4), 6)
    assert streams("HunyuanVideoTransformer3DModel", [2, 3, 4, 0, 6], last) == (24, 6)


def test_models_that_are_split_are_those_with_checks() -> None:
    """Adapters are derived from others; plans are not."""
    checked = {
        "WanTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "LTXVideoTransformer3DModel",
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "QwenImageTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "CogVideoXTransformer3DModel",
    }
    assert set(split_models()) == checked
    plans = (DOCS / "parallel.md").read_text()
    assert all(f"`{name}`" in plans for name in checked)
    for name, tiny in TINY.items():
        if tiny.model not in checked:
            model = tiny.build()
            assert family_of(model).split_of(model) is None, name


def test_plans() -> None:
    assert context_parallel_plan(TINY["WanTransformer3DModel"].build()) is None
    for name in ("HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel"):
        model = TINY[name].build()
        with pytest.raises(ValueError, match=r"needs sparse attention: put it on first"):
            context_parallel_plan(model)
        with enable_sparse_attention(model, "dense"):
            assert "proj_out" in context_parallel_plan(model)
            assert "proj_out" in context_parallel_plan(torch.compile(model))
    for name in (
        "MochiTransformer3DModel",
        "HunyuanImageTransformer2DModel",
        "HunyuanVideoTransformer3DModel-token-replace",
    ):
        with pytest.raises(ValueError, match=r"no context-parallel plan for this .*'WanTransf"):
            context_parallel_plan(TINY[name].build())
