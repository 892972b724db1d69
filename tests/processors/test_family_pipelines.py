"""Sparse attention inside the real pipelines of the main families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_pipelines import HEUN, PIPELINES, TinyPipeline

from dit_sparse import AdaSpa, Report, Schedule, enable_sparse_attention
from dit_sparse.schedule import phases

SEARCH = (0.25, 0.5)
METHOD = AdaSpa(sparsity=0.5, search=SEARCH)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=PIPELINES, ids=lambda tiny: tiny.name)
def tiny(request: pytest.FixtureRequest) -> TinyPipeline:
    return request.param


def assert_phases(report: Report, branches: tuple[str, ...], steps: int) -> None:
    """Every layer of every branch did at each step what the schedule says."""
    expected = Counter(phase.value for phase in phases(Schedule(SEARCH), steps))
    assert {layer["branch"] for layer in report.layers} == set(branches)
    for layer in report.layers:
        assert layer["phases"] == expected, layer


def test_dense_generations_are_upstream_bit_for_bit(tiny: TinyPipeline) -> None:
    pipe = tiny.build()
    expected = [tiny.run(pipe), tiny.run(pipe, steps=3, size=1, seed=1)]
    with enable_sparse_attention(pipe, "dense") as sparse:
        assert torch.equal(tiny.run(pipe), expected[0])
        first = sparse.bindings[0].passing.layout
        assert torch.equal(tiny.run(pipe, steps=3, size=1, seed=1), expected[1])
        assert sparse.bindings[0].passing.layout.grid != first.grid
    assert torch.equal(tiny.run(pipe), expected[0])


def test_a_second_generation_starts_afresh(tiny: TinyPipeline) -> None:
    """Another prompt, resolution and number of steps, on a pipeline that was used before."""
    pipe = tiny.build()
    upstream = tiny.run(pipe, steps=4, size=1, seed=1)
    with enable_sparse_attention(pipe, METHOD) as sparse:
        alone = tiny.run(pipe, steps=4, size=1, seed=1)
        assert_phases(sparse.report(), tiny.branches, 4)
        assert sparse.report().density < 1
    assert not torch.equal(alone, upstream)
    with enable_sparse_attention(pipe, METHOD) as sparse:
        tiny.run(pipe, steps=5)
        assert_phases(sparse.report(), tiny.branches, 5)
        assert torch.equal(tiny.run(pipe, steps=4, size=1, seed=1), alone)
        assert_phases(sparse.report(), tiny.branches, 4)


def test_an_aborted_generation_leaves_nothing(tiny: TinyPipeline) -> None:
    if not tiny.callback:
        pytest.skip("has no callback")
    stop = {tiny.callback: abort_at_third_step}
    pipe = tiny.build()
    with enable_sparse_attention(pipe, METHOD) as sparse:
        alone = tiny.run(pipe)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(pipe, seed=1, **stop)
        assert torch.equal(tiny.run(pipe), alone)
        assert_phases(sparse.report(), tiny.branches, 4)


def abort_at_third_step(*arguments: Any) -> Any:
    # (pipe, step, timestep, tensors), or (step, timestep, latents) in older pipelines.
    step = arguments[1] if len(arguments) == 4 else arguments[0]
    if step == 2:
        raise KeyboardInterrupt
    return arguments[-1]


def test_callbacks_see_every_step(tiny: TinyPipeline) -> None:
    if tiny.callback != "callback_on_step_end":
        pytest.skip("has no callback that can change the latents")
    seen: list[int] = []

    def halve(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] / 2}

    pipe = tiny.build()
    expected = tiny.run(pipe, callback_on_step_end=halve)
    with enable_sparse_attention(pipe, "dense"):
        assert torch.equal(tiny.run(pipe, callback_on_step_end=halve), expected)
    assert seen == [0, 1, 2, 3] * 2


def test_an_interrupted_generation_ends(tiny: TinyPipeline) -> None:
    if not hasattr(tiny.build(), "interrupt") or not tiny.callback:
        pytest.skip("cannot be interrupted")

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return {}

    pipe = tiny.build()
    with enable_sparse_attention(pipe, METHOD) as sparse:
        alone = tiny.run(pipe)
        tiny.run(pipe, callback_on_step_end=interrupt)
        assert {sum(layer["phases"].values()) for layer in sparse.report().layers} == {2}
        assert torch.equal(tiny.run(pipe), alone)


def test_distilled_step_counts(tiny: TinyPipeline) -> None:
    pipe = tiny.build()
    with enable_sparse_attention(pipe, METHOD) as sparse:
        for steps in (8, 4):
            tiny.run(pipe, steps=steps)
            assert_phases(sparse.report(), tiny.branches, steps)


@pytest.mark.parametrize("kind", ["prompts", "results"])
def test_batches(tiny: TinyPipeline, kind: str) -> None:
    if (kind == "prompts" and tiny.prompts < 2) or (kind == "results" and not tiny.repeats):
        pytest.skip("not with given embeddings")
    options = {"prompts": 2} if kind == "prompts" else {tiny.per_prompt: 2}
    pipe = tiny.build()
    expected = tiny.run(pipe, **options)
    with enable_sparse_attention(pipe, "dense"):
        assert torch.equal(tiny.run(pipe, **options), expected)
    with enable_sparse_attention(pipe, "full"):
        scale = float(expected.abs().max())
        assert (tiny.run(pipe, **options) - expected).abs().max() < 1e-3 * scale
    with enable_sparse_attention(pipe, METHOD) as sparse:
        assert tiny.run(pipe, **options).shape == expected.shape
        assert_phases(sparse.report(), tiny.branches, 4)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("StableDiffusion3Pipeline", HEUN), ("PixArtAlphaPipeline", "HeunDiscreteScheduler")],
)
def test_a_scheduler_that_calls_twice_a_step(name: str, scheduler: str) -> None:
    tiny = next(tiny for tiny in PIPELINES if tiny.name == name)
    pipe = tiny.build((scheduler, {}))
    expected = tiny.run(pipe, steps=4)
    with enable_sparse_attention(pipe, "dense") as sparse:
        assert torch.equal(tiny.run(pipe, steps=4), expected)
        # Four steps and three corrections.
        calls: Counter[int] = Counter()
        for layer in sparse.report().layers:
            calls[layer["layer"]] += sum(layer["phases"].values())
        assert set(calls.values()) == {7}
    with enable_sparse_attention(pipe, METHOD) as sparse:
        alone = tiny.run(pipe, steps=4)
        # Steps count, not calls. The corrections are a branch of their own: it begins in the
        # second step, where it searches instead of refreshing a mask that it does not have.
        layers = sparse.report().layers
        assert {layer["branch"] for layer in layers} == {"call", "call#1"}
        for layer in layers:
            first = {"search": 1, "refresh": 1, "sparse": 2}
            assert layer["phases"] == (
                first if layer["branch"] == "call" else {"search": 1, "sparse": 2}
            )
        assert torch.equal(tiny.run(pipe, steps=4), alone)


@pytest.mark.parametrize("ar_step", [0, 2])
def test_windows_of_a_long_video_are_generations(ar_step: int) -> None:
    """Diffusion forcing gives each frame a noise level, and windows begin with clean frames."""
    tiny = next(tiny for tiny in PIPELINES if tiny.name.startswith("SkyReelsV2Diffusion"))
    options = {"ar_step": ar_step, "overlap_history": 5, "base_num_frames": 9, "num_frames": 17}
    pipe = tiny.build()
    expected = tiny.run(pipe, steps=6, **options)
    with enable_sparse_attention(pipe, "dense") as sparse:
        assert torch.equal(tiny.run(pipe, steps=6, **options), expected)
        # Three windows; the last has two new frames behind a clean one: six or eight passes.
        assert sparse.bindings[0].run.generation == 2
        steps = {sum(layer["phases"].values()) for layer in sparse.report().layers}
        assert steps == {6}
