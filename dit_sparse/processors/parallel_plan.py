"""Context parallelism for models of which diffusers has no plan."""

from __future__ import annotations

from typing import Any

from diffusers.utils.torch_utils import unwrap_module

from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.checks import split_models
from dit_sparse.processors.family import family_of


def context_parallel_plan(model: Any) -> dict[str, Any] | None:
    """The ``cp_plan`` with which ``model`` can split its sequence over devices.

    ``model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2),
    cp_plan=context_parallel_plan(model))`` works with every model that sparse attention can follow:
    the result is None where diffusers has a plan of its own, and means just that to diffusers.

    The plans from here (HunyuanVideo, CogVideoX) need sparse attention, because the models' own
    processors do not attend over devices or take another order of tokens for the model's. The
    method ``"dense"`` is theirs without sparsity.

    Args:
        model: A transformer.

    Raises:
        ValueError: If sparse attention cannot follow this model over devices, or is not on it where
            the plan needs it.
    """
    model = unwrap_module(model)
    family = family_of(model)
    plan = None
    if family.split_of(model) is not None:
        if getattr(type(model), "_cp_plan", None) is not None:
            return None
        plan = family.parallel_plan(model)
    if plan is None:
        raise ValueError(
            f"there is no context-parallel plan for this {type(model).__name__}; sparse attention "
            f"follows {split_models()} over devices"
        )
    if binding_of(model) is None:
        raise ValueError(
            f"this plan for {type(model).__name__} needs sparse attention: put it on first, e.g. "
            'enable_sparse_attention(model, "dense") for none'
        )
    return plan
