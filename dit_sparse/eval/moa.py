"""A plan of spans for :class:`~dit_sparse.methods.moa.MoA`, from generations made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_sparse.config import SparseConfig
from dit_sparse.methods.moa import MoA, choose_spans
from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.processor import enable_sparse_attention


def plan_spans(pipe: Any, method: MoA, prompts: Sequence[str], **arguments: Any) -> MoA:
    """``method`` with the plan that suits ``prompts`` on average.

    Every prompt is generated up to the end of the warm-up; the losses of its spans are averaged
    over prompts and CFG branches before one choice is made. A plan belongs to the model, the size
    of the clip and the number of steps that it was made with.

    Args:
        pipe: A pipeline with one transformer.
        method: The settings; their own plan is ignored.
        prompts: Captions.
        **arguments: Of the pipeline's call, such as sizes and steps.

    Raises:
        ValueError: If there is no prompt, or no choice is within the budget.
    """
    if not prompts:
        raise ValueError("a plan needs at least one prompt to try spans on, got none")
    method = replace(method, plan=None)
    tables: list[Tensor] = []
    costs: Any = None
    handle = enable_sparse_attention(pipe, SparseConfig(method))
    try:
        binding = binding_of(pipe.transformer)
        assert binding is not None

        def after_step(pipe: Any, index: int, timestep: Any, tensors: dict) -> dict:
            nonlocal costs
            branches = [kept for kept in binding.run.shared.values() if "losses" in kept]
            if branches and all(len(kept["losses"]) == len(binding.sites) for kept in branches):
                for shared in branches:
                    losses = shared["losses"]
                    tables.append(torch.stack([losses[layer] for layer in sorted(losses)]).cpu())
                    costs = shared["cost"]
                pipe._interrupt = True
            return tensors

        for prompt in prompts:
            pipe(prompt=prompt, output_type="latent", callback_on_step_end=after_step, **arguments)
    finally:
        handle.remove()
    mean = torch.stack(tables).double().mean(0).numpy()
    chosen = choose_spans(mean, costs, 1 - method.sparsity, method.distinct)
    return replace(method, plan=tuple(tuple(heads) for heads in chosen.tolist()))
