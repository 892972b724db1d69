"""What is remembered between steps, and for whom."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.methods.base import Call
from dit_sparse.processors.run import MAX_REPEATS

# Dense, search, sparse, refresh, sparse over five steps.
SETTINGS = {"sparsity": 0.5, "search": (2, 4)}
PHASES = ["dense", "search", "sparse", "refresh", "sparse"]


def held(sparse: SparseProcessor) -> int:
    return sum(binding.run.held_bytes() for binding in sparse.bindings)


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
    [
        (c, s)
        for c in ("fields", "named", "string", "none")
        for s in (0, 1, 3)
        if (c, s) != ("none", 0)
    ],
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


def test_branches_may_differ_in_batch_size(
    wan: Any, inputs: Any, calls: list[Call], phases: Any
) -> None:
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
    assert phases() == {"cond_uncond": order, "uncond_stg": order}


def test_a_mask_is_not_used_for_another_batch_size(wan: Any, inputs: Any, phases: Any) -> None:
    model = wan()
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)):
        for t, batch in ((900.0, 1), (700.0, 2), (500.0, 2), (300.0, 1)):
            with model.cache_context("cond"):
                model(**inputs(t, batch=batch))
    assert phases() == {"cond": ["search", "search", "sparse", "search"]}


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


def test_many_calls_at_one_timestep_stay_bounded(wan: Any, inputs: Any) -> None:
    model = wan(num_layers=1)
    with enable_sparse_attention(model, "adaspa", sparsity=0.5, search=(0,)) as sparse:
        run = sparse.bindings[0].run
        for _ in range(MAX_REPEATS + 2):
            model(**inputs(500.0))
        assert len(run.branches) == 2
