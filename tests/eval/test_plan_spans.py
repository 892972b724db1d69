"""A plan of spans, from generations of a tiny pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from dit_sparse import SparseConfig, enable_sparse_attention
from dit_sparse.eval.moa import plan_spans
from dit_sparse.methods.moa import MoA
from dit_sparse.processors.binding import binding_of

SIZE = {"height": 64, "width": 64, "num_frames": 8}


def test_a_plan_is_made_of_the_losses_and_is_followed(pipe: Any) -> None:
    spans = ((0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    method = MoA(0.5, spans, warmup=2)
    calls: list[int] = []
    original = pipe.transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    pipe.transformer.forward = forward
    try:
        arguments = {**SIZE, "num_inference_steps": 6, "guidance_scale": 2.0}
        planned = plan_spans(pipe, method, ["a heart", "a star"], **arguments)
    finally:
        del pipe.transformer.forward
    # Two prompts, two branches, and no step after the warm-up.
    assert len(calls) == 2 * 2 * 2
    assert planned.plan is not None
    assert [len(heads) for heads in planned.plan] == [2, 2]
    assert binding_of(pipe.transformer) is None
    data = SparseConfig(planned).to_dict()
    assert SparseConfig.from_dict(data).method == planned
    with enable_sparse_attention(pipe, SparseConfig(planned)) as handle:
        pipe("a heart", **SIZE, num_inference_steps=4, guidance_scale=1.0, output_type="latent")
        report = handle.report()
    assert report.dense_steps == 2
    assert all("search" not in entry["phases"] for entry in report.layers)
    assert report.sparse_density <= 0.5 + 1e-6


def test_a_plan_needs_prompts(pipe: Any) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        plan_spans(pipe, MoA(), [])
