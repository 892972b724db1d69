"""Observed generations show one step, whole, and leave the pipeline as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.methods.base import Call
from dit_sparse.pipelines.observe import observe_step


@pytest.mark.parametrize(("guidance", "branches"), [(1.0, ["cond"]), (3.0, ["cond", "uncond"])])
def test_every_call_of_the_step_is_shown(
    tiny_pipe: Any, arguments: dict[str, Any], guidance: float, branches: list[str]
) -> None:
    processors = dict(tiny_pipe.transformer.attn_processors)
    passes: list[int] = []
    handle = tiny_pipe.transformer.register_forward_hook(lambda *_: passes.append(1))
    seen: list[tuple[int, str, int, float]] = []

    def observer(call: Call) -> None:
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (call.q, call.k, call.v))
        ).transpose(1, 2)
        error = (exact - call.dense()).abs().max()
        seen.append((call.step.index, call.step.branch, call.layer, float(error)))

    shown = observe_step(tiny_pipe, 1, observer, {**arguments, "guidance_scale": guidance})
    handle.remove()
    expected = [(1, branch, layer) for branch in branches for layer in range(2)]
    assert [entry[:3] for entry in seen] == expected
    assert max(entry[3] for entry in seen) < 1e-6
    assert shown == len(expected)
    # The third step was not run.
    assert len(passes) == 2 * len(branches)
    assert dict(tiny_pipe.transformer.attn_processors) == processors


def test_a_generation_after_an_observed_one_is_whole(
    tiny_pipe: Any, arguments: dict[str, Any]
) -> None:
    def generate() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return tiny_pipe(**{**arguments, "generator": noise}, output_type="latent").frames

    before = generate()
    observe_step(tiny_pipe, 0, lambda call: None, arguments)
    assert torch.equal(generate(), before)


@pytest.mark.parametrize("step", [-1, 3])
def test_steps_that_do_not_exist_are_refused(
    tiny_pipe: Any, arguments: dict[str, Any], step: int
) -> None:
    with pytest.raises(ValueError, match=r"step must be in 0\.\.2"):
        observe_step(tiny_pipe, step, lambda call: None, arguments)
