"""Looking at the self-attention calls of a generation, for offline searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dit_sparse.methods.base import Call
from dit_sparse.methods.dense import Dense
from dit_sparse.processors.processor import enable_sparse_attention
from dit_sparse.schedule import Phase


def observe_step(
    pipe: Any, step: int, observer: Callable[[Call], None], arguments: Mapping[str, Any]
) -> int:
    """Generates with dense attention up to ``step`` and shows all calls of that step.

    Nothing is recorded: the observer sees queries, keys and values where they are, one layer after
    the other, so memory does not grow with the model.

    Args:
        pipe: A diffusers pipeline with at least one supported transformer, and no sparse attention.
        step: Denoising step, 0-based.
        observer: Called with each :class:`Call`; with classifier-free guidance every layer comes
            once a branch. It may keep what it computes, but must not keep the call.
        arguments: Of the pipeline's call; ``num_inference_steps`` is required. The rest of the
            generation is skipped where the pipeline can be interrupted, and nothing is decoded.

    Returns:
        How many calls were shown.

    Raises:
        ValueError: If the generation has no such step, or no call was made in it.
    """
    steps = arguments["num_inference_steps"]
    if not 0 <= step < steps:
        raise ValueError(f"step must be in 0..{steps - 1} for {steps} steps, got {step}")
    shown = 0

    def attend(call: Call) -> Tensor:
        nonlocal shown
        if call.step.index == step:
            shown += 1
            observer(call)
        call.record(Phase.DENSE)
        return call.dense()

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index >= step:
            pipe._interrupt = True
        return tensors

    with enable_sparse_attention(pipe, Dense()) as processor:
        for binding in processor.bindings:
            binding.attend = attend
        pipe(**{**arguments, "callback_on_step_end": stop, "output_type": "latent"})
    if not shown:
        raise ValueError(
            f"step {step} of {steps} made no self-attention call that could be observed; choose "
            "another step, or switch step caches off"
        )
    return shown
