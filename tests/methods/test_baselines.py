"""Each baseline does what it is named after."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.eval.arms import parse_arm
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.base import Call
from dit_sparse.methods.baselines import BASELINES, as_arm, baseline
from dit_sparse.methods.block_scores import error_scores, pooled_softmax
from dit_sparse.schedule import Phase


def steps(method: Any, inputs: list[Any]) -> list[tuple[torch.Tensor, Call]]:
    memory: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    done = []
    for index, data in enumerate(inputs):
        call = data.call(index, memory, total=len(inputs))
        call.shared = shared
        done.append((method.attend(call), call))
    return done


@pytest.fixture
def inputs(make: Any) -> list[Any]:
    return [make(grid=(4, 8, 12), text=5, seed=seed) for seed in range(9)]


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_the_command_line_takes_it(name: str) -> None:
    assert parse_arm(as_arm(name)).config.method == baseline(name)


def test_drop_is_adaspa_with_one_search(inputs: list[Any]) -> None:
    ours = steps(baseline("drop", density=0.4), inputs)
    adaspa = AdaSpa(sparsity=0.6, search=(0.2,), head_adaptive=False, row_stride=1)
    theirs = steps(adaspa, inputs)
    for (a, call), (b, other) in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and call.phase is other.phase


@pytest.mark.parametrize(
    ("name", "score", "slope"),
    [
        ("sol_attn", pooled_softmax, False),
        ("pisa", pooled_softmax, True),
        ("svg_ear", error_scores, False),
    ],
)
def test_masks_of_every_step_come_from_its_own_scores(
    inputs: list[Any], name: str, score: Any, slope: bool
) -> None:
    done = steps(baseline(name, density=0.4, warmup=1, tile=None), inputs[:3])
    out, _ = done[2]
    call = inputs[2].call()
    means = call.summarize(64, first_order=slope)
    count = torch.full((1, 1), 2)
    mask = call.top_blocks(score(call, means, 64), count, 64).mask
    torch.testing.assert_close(out, call.attention(mask, means).out)


def test_reuse_returns_the_last_dense_output(make: Any) -> None:
    inputs = [make(grid=(4, 8, 12), seed=seed, dtype=torch.float32) for seed in range(9)]
    done = steps(baseline("reuse", warmup=1), inputs)
    for index, (out, call) in enumerate(done):
        assert torch.equal(out, inputs[index // 4 * 4].attention())
        assert call.phase is (Phase.SEARCH if index % 4 == 0 else Phase.SPARSE)


def test_extrapolated_reuse_continues_a_line(make: Any) -> None:
    start, change = make(grid=(4, 8, 12), seed=0), make(grid=(4, 8, 12), seed=1)
    inputs = []
    for step in range(9):
        data = make(grid=(4, 8, 12), seed=0)
        data.v = start.v + step * change.v
        inputs.append(data)
    done = steps(baseline("reuse_extrapolated", warmup=1), inputs)
    # The line is known after the second refresh, at step 4.
    assert (done[3][0] - inputs[3].attention()).abs().max() > 1e-2
    for index in range(4, 9):
        assert (done[index][0] - inputs[index].attention()).abs().max() < 1e-12


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="svg_ear"):
        baseline("svg")
