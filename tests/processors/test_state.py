"""What is remembered between steps, and for whom."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanTransformer3DModel
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.methods.base import Call
from dit_sparse.processors.run import MAX_REPEATS

# Dense, search, sparse, refresh, sparse over five steps.
SETTINGS = {"sparsity": 0.5, "search": (2, 4)}
PHASES = ["dense", "search", "sparse", "refresh", "sparse"]
CONTEXTS = ["fields", "named", "string", "none"]


@pytest.fixture
def context(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """How much a pipeline tells: as WanPipeline, WanImageToVideo, before diffusers 0.41, or V2V."""

    @contextmanager
    def string(self: Any, name: str, **fields: Any) -> Any:
        _set_cache_context(self, name)
        yield
        _set_cache_context(self, None)

    @contextmanager
    def named(self: Any, name: str, **fields: Any) -> Any:
        _set_cache_context(self, CacheContext(name))
        yield
        _set_cache_context(self, None)

    def none(self: Any, name: str, **fields: Any) -> Any:
        return nullcontext()

    replacement = {"string": string, "named": named, "none": none}.get(request.param)
    if replacement is not None:
        monkeypatch.setattr(WanTransformer3DModel, "cache_context", replacement)
    return request.param


def every_context(test: Any) -> Any:
    return pytest.mark.parametrize("context", CONTEXTS, indirect=True)(test)


def phases(calls: list[Call], layer: int = 0) -> dict[str, list[str]]:
    """Phases of one layer by branch, in order."""
    found: dict[str, list[str]] = {}
    for call in calls:
        if call.layer == layer:
            found.setdefault(call.step.branch, []).append(call.phase.value)
    return found


def held(sparse: SparseProcessor) -> int:
    return sum(binding.run.held_bytes() for binding in sparse.bindings)


@every_context
def test_phases_follow_the_steps_whatever_the_pipeline_tells(
    context: str, clip: Any, calls: list[Call]
) -> None:
    run = clip()
    sparse = enable_sparse_attention(run.pipe, "adaspa", **SETTINGS)
    run(steps=5)
    names = ["call", "call#1"] if context == "none" else ["cond", "uncond"]
    assert phases(calls) == dict.fromkeys(names, PHASES) == phases(calls, layer=1)
    assert [call.step.index for call in calls[::4]] == [0, 1, 2, 3, 4]
    assert {call.step.total for call in calls} == {5}
    report = sparse.report()
    assert (report.dense_steps, report.sparse_steps) == (2, 3)
    assert report.density == 0.4 + 0.6 * 0.5 and report.sparse_density == 0.5
    assert held(sparse) == 0 < report.cache_bytes


@every_context
@pytest.mark.parametrize(
    "other", [{}, {"seed": 1}, {"size": 64}, {"steps": 3}, {"batch": 2}, {"guidance_scale": 1.0}]
)
def test_another_generation_in_between_changes_nothing(
    context: str, other: dict[str, Any], clip: Any, calls: list[Call]
) -> None:
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        alone, after = run(), run(**other)
        again = run()
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS):
        assert torch.equal(run(**other), after)
    assert torch.equal(alone, again)
    assert {call.step.generation for call in calls} == {0, 1, 2}


class Stop(Exception):
    pass


@contextmanager
def stopping(model: Any, forward: int, layer: int) -> Any:
    """Raises in block ``layer`` of the ``forward``-th pass from now."""
    seen: Counter[int] = Counter()

    def stop(module: Any, args: Any) -> None:
        seen[layer] += 1
        if seen[layer] == forward + 1:
            raise Stop

    handle = model.blocks[layer].register_forward_pre_hook(stop)
    yield
    handle.remove()


@every_context
@pytest.mark.parametrize(
    ("forward", "layer", "then"),
    [
        # In the first pass, in the second branch of the first step, and in a step with masks.
        (0, 1, {}),
        (1, 1, {}),
        (1, 0, {}),
        (4, 1, {}),
        (1, 1, {"size": 64}),
        (1, 1, {"batch": 2}),
        (1, 1, {"guidance_scale": 1.0}),
    ],
)
def test_a_generation_after_an_interrupt_inside_a_pass_is_like_the_first(
    context: str, layer: int, forward: int, then: dict[str, Any], clip: Any
) -> None:
    run = clip()
    settings = {"sparsity": 0.5, "search": (0, 3)}
    with enable_sparse_attention(run.pipe, "adaspa", **settings):
        expected = run(steps=4, **then)
    with enable_sparse_attention(run.pipe, "adaspa", **settings) as sparse:
        with pytest.raises(Stop), stopping(run.pipe.transformer, forward, layer):
            run(steps=4, seed=3)
        assert torch.equal(run(steps=4, **then), expected)
        assert held(sparse) == 0


@pytest.mark.parametrize(
    ("context", "step"),
    # Without any name, a restart after the whole first step looks like more branches of it.
    [(c, s) for c in CONTEXTS for s in (0, 1, 3) if (c, s) != ("none", 0)],
    indirect=["context"],
)
def test_a_generation_after_an_interrupt_between_steps_is_like_the_first(
    context: str, step: int, clip: Any
) -> None:
    def stop(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        if index == step:
            raise KeyboardInterrupt
        return tensors

    run = clip()
    settings = {"sparsity": 0.5, "search": (0, 3)}
    with enable_sparse_attention(run.pipe, "adaspa", **settings):
        expected = run(steps=4)
    with enable_sparse_attention(run.pipe, "adaspa", **settings):
        with pytest.raises(KeyboardInterrupt):
            run(steps=4, seed=3, callback_on_step_end=stop)
        assert torch.equal(run(steps=4), expected)


def test_reset_covers_the_interrupt_that_cannot_be_seen(clip: Any, monkeypatch: Any) -> None:
    def stop(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        WanTransformer3DModel, "cache_context", lambda self, name, **fields: nullcontext()
    )
    run = clip()
    with enable_sparse_attention(run.pipe, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        expected = run(steps=4)
        with pytest.raises(KeyboardInterrupt):
            run(steps=4, seed=3, callback_on_step_end=stop)
        sparse.reset()
        assert held(sparse) == 0
        assert torch.equal(run(steps=4), expected)


@every_context
def test_branches_computed_alternately_equal_branches_computed_apart(
    context: str, clip: Any
) -> None:
    run = clip()
    model = run.pipe.transformer
    recorded: list[tuple[dict[str, Any], Tensor]] = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, out: recorded.append((kwargs, out[0])), with_kwargs=True
    )
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=5)
        handle.remove()
        assert len(recorded) == 10
        for first in (0, 1):
            sparse.reset()
            for kwargs, together in recorded[first::2]:
                assert torch.equal(model(**kwargs)[0], together)


def test_branches_do_not_share_masks(clip: Any) -> None:
    run = clip()
    masks: dict[str, list[Tensor]] = {}

    def look(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        if index == 3:
            for name, branch in sparse.bindings[0].run.branches.items():
                masks[name] = [memory["mask"].dense() for memory in branch.memory.values()]
        return tensors

    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=5, callback_on_step_end=look)
    assert set(masks) == {"cond", "uncond"} and len(masks["cond"]) == len(masks["uncond"]) == 2
    assert any(not torch.equal(*pair) for pair in zip(*masks.values(), strict=True))


def test_batched_guidance_has_a_mask_for_every_batch_element(wan: Any, inputs: Any) -> None:
    model = wan()
    steps = [900.0, 700.0, 500.0]
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        together = [model(**inputs(t, batch=2))[0] for t in steps]
        mask = sparse.bindings[0].run.branches["call"].memory[0]["mask"].dense()
        assert mask.shape[0] == 2 and not torch.equal(mask[0], mask[1])
        for element in range(2):
            sparse.reset()
            for t, both in zip(steps, together, strict=True):
                given = inputs(t, batch=2)
                one = {
                    k: v[element : element + 1] if isinstance(v, Tensor) else v
                    for k, v in given.items()
                }
                assert (model(**one)[0][0] - both[element]).abs().max() < 1e-5


def test_branches_may_differ_in_batch_size(wan: Any, inputs: Any, calls: list[Call]) -> None:
    # LTX-2 predicts both guidance branches in one batch and then a third one alone.
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)):
        for t in (900.0, 700.0, 500.0):
            with model.cache_context("cond_uncond"):
                model(**inputs(t, batch=2))
            with model.cache_context("uncond_stg"):
                model(**inputs(t, batch=1, seed=1))
    assert {call.step.generation for call in calls} == {0}
    order = ["search", "sparse", "sparse"]
    assert phases(calls) == {"cond_uncond": order, "uncond_stg": order}


def test_a_mask_is_not_used_for_another_batch_size(
    wan: Any, inputs: Any, calls: list[Call]
) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)):
        for t, batch in ((900.0, 1), (700.0, 2), (500.0, 2), (300.0, 1)):
            with model.cache_context("cond"):
                model(**inputs(t, batch=batch))
    assert phases(calls) == {"cond": ["search", "search", "sparse", "search"]}


@pytest.mark.parametrize("context", ["fields", "named", "string"], indirect=True)
def test_experts_have_their_own_masks_and_share_the_steps(
    context: str, clip: Any, wan: Any, calls: list[Call]
) -> None:
    run = clip(second=wan(seed=1), boundary_ratio=0.8)
    with enable_sparse_attention(run.pipe, "adaspa", sparsity=0.5, search=(2, 5)) as sparse:
        first = run(steps=6)
        experts = [call for call in calls if call.layer == 0 and call.step.branch == "cond"]
        assert [call.step.index for call in experts] == list(range(6))
        assert sparse.bindings[0].run.dense_steps | sparse.bindings[0].run.sparse_steps == {0, 1, 2}
        # The second expert has no mask at the switch, so it searches one of its own.
        assert [call.phase.value for call in experts] == [
            *("dense", "search", "sparse"),
            *("search", "refresh", "sparse"),
        ]
        report = sparse.report()
        assert (report.dense_steps, report.sparse_steps) == (3, 3)
        assert {entry["model"] for entry in report.layers} == {0, 1}
        assert torch.equal(run(steps=6), first)


def test_the_report_leaves_out_an_expert_that_the_last_generation_did_not_reach(
    clip: Any, wan: Any
) -> None:
    run = clip(second=wan(seed=1), boundary_ratio=0.8)
    with enable_sparse_attention(run.pipe, "adaspa", **SETTINGS) as sparse:
        run(steps=6)
        with pytest.raises(Stop), stopping(run.pipe.transformer, forward=2, layer=1):
            run(steps=6)
        assert {entry["model"] for entry in sparse.report().layers} == {0}
        run(steps=6)
        assert {entry["model"] for entry in sparse.report().layers} == {0, 1}


@every_context
def test_a_second_order_scheduler_repeats_timesteps(
    context: str, clip: Any, calls: list[Call]
) -> None:
    run = clip(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0))
    with enable_sparse_attention(run.pipe, "adaspa", sparsity=0.5, search=(0.4,)) as sparse:
        first = run(steps=5, guidance_scale=1.0)
        timesteps = run.pipe.scheduler.timesteps.tolist()
        assert len(timesteps) == 9 and len(set(timesteps)) == 5
        if context == "fields":
            # The pipeline counts evaluations, nine of them: searched in the fourth.
            assert phases(calls) == {"cond": ["dense"] * 3 + ["search"] + ["sparse"] * 5}
        else:
            # Five noise levels, searched at the second; both evaluations have their own masks.
            name = "call" if context == "none" else "cond"
            assert phases(calls) == {
                name: ["dense", "search", "sparse", "sparse", "sparse"],
                f"{name}#1": ["search", "sparse", "sparse", "sparse"],
            }
        assert torch.equal(run(steps=5, guidance_scale=1.0), first)
        assert sparse.report().sparse_density == 0.5


def test_without_a_pipeline_shares_are_read_on_the_noise_scale(
    wan: Any, inputs: Any, calls: list[Call]
) -> None:
    model = wan()
    model.set_attn_processor(SparseProcessor("adaspa", sparsity=0.5, search=(0.3, 0.6)))
    for t in (1000.0, 800.0, 600.0, 400.0):
        model(**inputs(t))
    assert phases(calls) == {"call": ["dense", "dense", "search", "sparse"]}
    # A pipeline that tells the step but not how many there are.
    calls.clear()
    for index, t in enumerate((1000.0, 800.0, 600.0, 400.0)):
        with model.cache_context("cond", step_index=index):
            model(**inputs(t))
    assert phases(calls) == {"cond": ["dense", "dense", "search", "sparse"]}


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


def test_many_calls_at_one_timestep_stay_bounded(wan: Any, inputs: Any) -> None:
    model = wan(num_layers=1)
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        run = sparse.bindings[0].run
        for _ in range(MAX_REPEATS + 2):
            model(**inputs(500.0))
        assert len(run.branches) == 2


STEP_CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.1),
    "mag": lambda pipe: MagCacheConfig(
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
                for place, (index, phase) in enumerate(made):
                    has_mask = any(p != "dense" for _, p in made[:place])
                    expected = "dense" if index < 1 else "sparse"
                    if index >= 1 and (not has_mask or index == 1):
                        expected = "search"
                    elif index == 4:
                        expected = "refresh"
                    assert phase == expected
        assert torch.equal(run(steps=8, **options), first)
        assert held(sparse) == 0
    model.disable_cache()
