"""What `SparseProcessor()` does without a word: on videos and images, in few and many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from tiny_pipelines import PIPELINES, TinyPipeline

from dit_sparse import SparseProcessor, enable_sparse_attention
from dit_sparse.methods import transfer
from dit_sparse.methods.base import Call
from dit_sparse.methods.compensated_delta import CompensatedDelta
from dit_sparse.processors.binding import Binding

NAMES = ("WanPipeline", "FluxPipeline", "HunyuanVideoPipeline", "QwenImagePipeline")
SOME = [tiny for tiny in PIPELINES if tiny.name in NAMES]


def test_it_is_compensated_delta() -> None:
    assert SparseProcessor().config.method == CompensatedDelta()
    assert SparseProcessor(density=0.2).config.method == CompensatedDelta(density=0.2)


def test_the_pipelines_below_exist() -> None:
    assert {tiny.name for tiny in SOME} == set(NAMES)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("tiny", SOME, ids=lambda tiny: tiny.name)
def test_few_steps(tiny: TinyPipeline, steps: int) -> None:
    pipe = tiny.build()
    upstream = tiny.run(pipe, steps=steps)
    with enable_sparse_attention(pipe, strict=True) as sparse:
        out = tiny.run(pipe, steps=steps)
        report = sparse.report()
        assert torch.equal(tiny.run(pipe, steps=steps), out)
    assert out.isfinite().all()
    assert report.dense_steps == max(1, round(0.2 * steps))
    assert report.sparse_steps == steps - report.dense_steps
    if steps == 1:
        assert torch.equal(out, upstream)
    assert (out - upstream).norm() < 0.2 * upstream.norm()


@pytest.mark.parametrize("shape", [(13, 64, 64), (1, 128, 128), (1, 16, 16), (5, 48, 80)])
@pytest.mark.parametrize("steps", [4, 12])
def test_grids(clip: Any, shape: tuple[int, int, int], steps: int) -> None:
    """Videos and images; fewer tokens than a block, and blocks that do not fit."""
    frames, height, width = shape
    run = clip()
    rng = torch.Generator().manual_seed(0)
    options = {
        "prompt_embeds": torch.randn(1, 8, 32, generator=rng),
        "negative_prompt_embeds": torch.randn(1, 8, 32, generator=rng),
        "height": height, "width": width, "num_frames": frames,
        "num_inference_steps": steps, "output_type": "latent",
    }  # fmt: skip
    dense = run.pipe(**options, generator=torch.Generator().manual_seed(1)).frames
    with enable_sparse_attention(run.pipe, strict=True):
        out = run.pipe(**options, generator=torch.Generator().manual_seed(1)).frames
    assert (out - dense).norm() < 0.3 * dense.norm()


def test_many_steps_forget_nothing_and_keep_nothing(clip: Any, calls: list[Call]) -> None:
    run = clip()
    dense = run(steps=50, size=64)
    with enable_sparse_attention(run.pipe, strict=True) as sparse:
        out = run(steps=50, size=64)
        assert sparse.report().dense_steps == 10
        # The residual goes with the last step, everything else with the generation.
        assert sparse.bindings[0].run.held_bytes() == 0
        assert not any("residual0" in call.memory for call in calls)
    assert (out - dense).norm() < 0.3 * dense.norm()


@pytest.mark.parametrize("room", [0, 40_000, 160_000])
def test_memory_that_is_short_is_adapted_to(
    clip: Any, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    run = clip()
    dense = run(steps=6)
    monkeypatch.setattr(transfer.Transfer, "host_budget", lambda self: 0)
    with enable_sparse_attention(run.pipe, budget_gb=room / 1e9, strict=True) as sparse:
        out = run(steps=6)
        notes = sparse.bindings[0].run.notes
    assert any("residual" in line for line in notes.values())
    assert out.isfinite().all()
    assert (out - dense).norm() < 0.5 * dense.norm()


def test_refreshes_that_a_step_cache_skips_come_with_the_next_call(clip: Any) -> None:
    """First block cache: the first layer runs always, the others in some steps."""
    run = clip()
    run.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    seen: dict[int, list[int]] = {0: [], 1: []}
    with enable_sparse_attention(run.pipe, period=4, refresh="rows", warmup=1) as sparse:
        binding = sparse.bindings[0]
        attend = binding.attend

        def watch(call: Call) -> torch.Tensor:
            out = attend(call)
            if call.step.branch == "cond":
                seen[call.layer].append(call.memory["turn"])
            return out

        binding.attend = watch
        out = run(steps=14)
    assert out.isfinite().all()
    assert len(seen[1]) < len(seen[0]) == 14, "the cache skipped nothing: lower the threshold"
    assert all(turns == list(range(len(turns))) for turns in seen.values())


def test_the_first_of_two_experts_leaves_room_for_the_second(
    clip: Any, wan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = clip(wan(seed=1), boundary_ratio=0.7)
    found: dict[str, list[int]] = {}
    attend = Binding._attend_by_config

    def watch(self: Binding, call: Call) -> torch.Tensor:
        found.setdefault(self.identity.component, []).append(call.models_waiting())
        return attend(self, call)

    monkeypatch.setattr(Binding, "_attend_by_config", watch)
    with enable_sparse_attention(run.pipe):
        for _ in range(2):
            found.clear()
            run(steps=6)
            assert set(found["transformer"]) == {1}
            assert set(found["transformer_2"]) == {0}
