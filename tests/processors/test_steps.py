"""Which step a call belongs to, whatever the pipeline tells and a step cache skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.hooks import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from installed import find, needs_step_context

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.methods.base import Call
from dit_sparse.processors.moment import Moment

# Dense, search, sparse, refresh, sparse over five steps.
SETTINGS = {"sparsity": 0.5, "search": (2, 4)}
PHASES = ["dense", "search", "sparse", "refresh", "sparse"]


def held(sparse: SparseProcessor) -> int:
    return sum(binding.run.held_bytes() for binding in sparse.bindings)


def test_phases_follow_the_steps_whatever_the_pipeline_tells(
    context: str, clip: Any, calls: list[Call], phases: Any
) -> None:
    run = clip()
    sparse = enable_sparse_attention(run.pipe, "adaspa", **SETTINGS)
    run(steps=5)
    names = ["call", "call#1"] if context == "none" else ["cond", "uncond"]
    assert phases() == dict.fromkeys(names, PHASES) == phases(layer=1)
    assert [call.step.index for call in calls[::4]] == [0, 1, 2, 3, 4]
    assert {call.step.total for call in calls} == {5}
    report = sparse.report()
    assert (report.dense_steps, report.sparse_steps) == (2, 3)
    assert report.density == 0.4 + 0.6 * 0.5 and report.sparse_density == 0.5
    assert held(sparse) == 0 < report.cache_bytes


def test_a_second_order_scheduler_repeats_timesteps(context: str, clip: Any, phases: Any) -> None:
    run = clip(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0))
    with enable_sparse_attention(run.pipe, "adaspa", sparsity=0.5, search=(0.4,)) as sparse:
        first = run(steps=5, guidance_scale=1.0)
        timesteps = run.pipe.scheduler.timesteps.tolist()
        assert len(timesteps) == 9 and len(set(timesteps)) == 5
        if context == "fields":
            # The pipeline counts evaluations, nine of them: searched in the fourth.
            assert phases() == {"cond": ["dense"] * 3 + ["search"] + ["sparse"] * 5}
        else:
            # Five noise levels, searched at the second; both evaluations have their own masks.
            name = "call" if context == "none" else "cond"
            assert phases() == {
                name: ["dense", "search", "sparse", "sparse", "sparse"],
                f"{name}#1": ["search", "sparse", "sparse", "sparse"],
            }
        assert torch.equal(run(steps=5, guidance_scale=1.0), first)
        assert sparse.report().sparse_density == 0.5


def test_without_a_pipeline_shares_are_read_on_the_noise_scale(
    wan: Any, inputs: Any, calls: list[Call], phases: Any
) -> None:
    model = wan()
    model.set_attn_processor(SparseProcessor("adaspa", sparsity=0.5, search=(0.3, 0.6)))
    for t in (1000.0, 800.0, 600.0, 400.0):
        model(**inputs(t))
    assert phases() == {"call": ["dense", "dense", "search", "sparse"]}


@needs_step_context
def test_a_step_is_told_without_their_number(
    wan: Any, inputs: Any, calls: list[Call], phases: Any
) -> None:
    model = wan()
    model.set_attn_processor(SparseProcessor("adaspa", sparsity=0.5, search=(0.3, 0.6)))
    for index, t in enumerate((1000.0, 800.0, 600.0, 400.0)):
        with model.cache_context("cond", step_index=index):
            model(**inputs(t))
    assert phases() == {"cond": ["dense", "dense", "search", "sparse"]}


def test_a_bf16_timestep_is_found_among_the_schedulers(clip: Any, calls: list[Call]) -> None:
    run = clip()
    run.pipe.scheduler.set_timesteps(50)
    model = run.pipe.transformer.to(torch.bfloat16)
    steps = run.pipe.scheduler.timesteps.to(torch.bfloat16)
    with enable_sparse_attention(run.pipe, "adaspa"):
        for index in (10, 20, 40):
            with model.cache_context("cond"):
                model(
                    torch.randn(1, 16, 4, 16, 16, dtype=torch.bfloat16),
                    steps[index : index + 1],
                    torch.randn(1, 8, 32, dtype=torch.bfloat16),
                )
    assert [call.step.index for call in calls[::2]] == [10, 20, 40]


STEP_CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.1),
    "mag": lambda pipe: find("diffusers.hooks", "MagCacheConfig")(
        threshold=10.0, max_skip_steps=1, retention_ratio=0.2, num_inference_steps=8,
        mag_ratios=[1.0] * 8,
    ),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"^blocks\.\d+\.attn1$"]
    ),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}  # fmt: skip


@pytest.mark.parametrize("pipeline_known", [True, False])
@pytest.mark.parametrize("context", ["fields", "named"], indirect=True)
@pytest.mark.parametrize("cache", STEP_CACHES)
def test_step_caches_skip_calls_and_never_shift_steps(
    cache: str, context: str, pipeline_known: bool, clip: Any, calls: list[Call]
) -> None:
    run = clip()
    model = run.pipe.transformer
    target = run.pipe if pipeline_known else model
    with enable_sparse_attention(target, "adaspa", sparsity=0.5, search=(2, 5)) as sparse:
        model.enable_cache(STEP_CACHES[cache](run.pipe))
        # Pyramid attention broadcast takes the second pass of a step for the next step.
        options = {"guidance_scale": 1.0} if cache == "pyramid" else {}
        first = run(steps=8, **options)
        for layer in range(2):
            for branch in ("cond",) if options else ("cond", "uncond"):
                made = [
                    (call.step.index, call.phase.value)
                    for call in calls
                    if (call.layer, call.step.branch) == (layer, branch)
                ]
                indices = [index for index, _ in made]
                assert indices == sorted(set(indices)) and indices[0] == 0 and indices[-1] >= 6
                assert len(made) == 8 if (cache, layer) == ("first block", 0) else len(made) < 8
                found = None
                for index, phase in made:
                    expected = "dense" if index < 1 else "sparse"
                    if index >= 1 and found is None:
                        expected = "search"
                    elif index >= 4 and found < 4:
                        # Due in step 4, which the cache may have skipped.
                        expected = "refresh"
                    assert phase == expected
                    found = index if phase in ("search", "refresh") else found
                assert found >= 4
        assert torch.equal(run(steps=8, **options), first)
        assert held(sparse) == 0
    model.disable_cache()


def test_progress_is_the_fallen_noise_whatever_the_pipeline_tells(
    context: str, clip: Any, calls: list[Call]
) -> None:
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        run(steps=5)
    timesteps = run.pipe.scheduler.timesteps.double()
    noise = [float(t / timesteps[0]) for t in timesteps]
    assert [call.step.progress for call in calls[::4]] == pytest.approx([1 - n for n in noise])
    # Flow matching shifts the noise: its fall is not the share of the steps.
    assert calls[4].step.progress < 0.9 / 5


def test_the_second_expert_goes_on_where_the_first_one_stopped(
    context: str, clip: Any, wan: Any, calls: list[Call]
) -> None:
    run = clip(second=wan(seed=1), boundary_ratio=0.8)
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        run(steps=5)
    timesteps = run.pipe.scheduler.timesteps.double()
    noise = [float(t / timesteps[0]) for t in timesteps]
    assert [call.step.progress for call in calls[::4]] == pytest.approx([1 - n for n in noise])
    experts = [call.model.component for call in calls[::4] if call.model]
    assert experts == ["transformer" if n >= 0.8 else "transformer_2" for n in noise]
    assert {"transformer", "transformer_2"} == set(experts)


@needs_step_context
def test_the_context_tells_the_noise_of_a_model_without_pipeline(
    wan: Any, inputs: Any, calls: list[Call]
) -> None:
    model = wan()
    model.set_attn_processor(SparseProcessor("adaspa", sparsity=0.5))
    sigmas = (1.0, 0.9, 0.5)
    for index, sigma in enumerate(sigmas):
        fields = {"step_index": index, "num_inference_steps": 3, "sigma": sigma}
        with model.cache_context("cond", **fields):
            model(**inputs(1000 * sigma))
    assert [call.step.progress for call in calls[::2]] == pytest.approx([0.0, 0.1, 0.5])
    assert calls[0].model is not None and calls[0].model.component == ""
    # Other schedulers' sigmas are not shares: the step count is all there is.
    calls.clear()
    for index, sigma in enumerate((14.6, 5.0, 2.0)):
        fields = {"step_index": index, "num_inference_steps": 3, "sigma": sigma}
        with model.cache_context("cond", **fields):
            model(**inputs(900.0 - 300 * index))
    assert [call.step.progress for call in calls[::2]] == pytest.approx([0.0, 1 / 3, 2 / 3])


def test_timesteps_on_another_scale_do_not_tell_the_place() -> None:
    """Z-Image counts from 0 to 1, which makes of a scheduler's 1000 ... 0 what rises to 1."""
    rising = tuple(1 - t for t in (1000.0, 667.0, 333.0, 0.0))
    first = Moment.read(None, torch.tensor([1.0]), rising)
    assert (first.position, first.total) == (None, 4)
    assert Moment.read(None, torch.tensor([1.0]), (1.0, 0.7, 0.3)).position == 0
    # Mochi counts upwards on the scheduler's own scale.
    falling = tuple(1000 - t for t in (0.0, 300.0, 700.0))
    assert Moment.read(None, torch.tensor([300.0]), falling).position == 2
