"""What is refused before any work is done: settings that cannot run on a model."""

from __future__ import annotations

from typing import Any

import torch

from dit_sparse.bands import FULL, BandMask
from dit_sparse.config import SparseConfig
from dit_sparse.kernels import ops
from dit_sparse.layout import TokenLayout
from dit_sparse.mask import Block, BlockMask, block_sides
from dit_sparse.methods import list_methods
from dit_sparse.processors.family import Family, family_of, list_families
from dit_sparse.processors.ulysses import Ulysses, ulysses_of


def check_bindable(model: Any, config: SparseConfig) -> tuple[Family, list[tuple[str, Any]]]:
    """The family of ``model`` and its sites, if ``config`` can run on it.

    Raises:
        ValueError: If the model has no adapter or a dense layer does not exist.
        NotImplementedError: If the model splits its sequence over devices in a way that cannot be
            followed, or a named kernel cannot compute its layers.
    """
    family = family_of(model)
    modules = family.sites(model)
    absent = [layer for layer in config.dense_layers if layer >= len(modules)]
    if absent:
        raise ValueError(
            f"dense_layers must be below {len(modules)}, the self-attention layers of this "
            f"{type(model).__name__}; got {absent}"
        )
    check_parallel(model, family, config)
    numerics = layer_numerics(model, modules[0][1]) if modules else None
    if numerics is not None:
        check_implementation(config, *numerics)
    return family, modules


def check_parallel(model: Any, family: Family, config: SparseConfig) -> Ulysses | None:
    """The devices over which ``model`` splits its sequence, or None, if ``config`` can run there.

    Raises:
        NotImplementedError: If it cannot, with the reason.
    """
    devices = ulysses_of(model)
    if devices is None:
        return None
    if family.split_of(model) is None:
        raise NotImplementedError(
            f"sparse attention does not know how context parallelism splits the sequence of "
            f"{type(model).__name__}; models of which it does are {split_models()}"
        )
    if not config.method.splits_heads:
        splitting = sorted(name for name, kind in list_methods().items() if kind.splits_heads)
        raise NotImplementedError(
            f"method {config.method.name!r} needs all heads of a layer on one device; under "
            f"context parallelism each has some of them. Methods that need no more: {splitting}"
        )
    return devices


def needs_sparse_attention(model: Any, family: Family) -> bool:
    """Whether ``model`` splits its sequence over devices as its own processors cannot."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    has_plan = getattr(type(model), "_cp_plan", None) is not None
    return config is not None and not has_plan and family.split_of(model) is not None


def split_models() -> list[str]:
    """Transformer classes that can split their sequence over devices under sparse attention."""
    families = list_families().items()
    return sorted(model for model, family in families if model in family.splits)


def layer_numerics(model: Any, module: Any) -> tuple[int, torch.dtype, torch.device] | None:
    """Head dim, dtype and device of the attention of ``module``, or None where not all are known.

    Args:
        model: The transformer.
        module: One of its self-attention modules.
    """
    inner, heads = getattr(module, "inner_dim", None), getattr(module, "heads", None)
    if not isinstance(inner, int) or not isinstance(heads, int):
        return None
    device, dtype = model.device, model.dtype
    if device.type == "meta" or not dtype.is_floating_point:
        return None
    if device.type == "cpu" and torch.cuda.is_available():
        # Models are often set up before they are moved.
        return None
    return inner // heads, dtype, device


def check_implementation(
    config: SparseConfig, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Refuses a named implementation, or a precision, that such heads cannot be computed with.

    Raises:
        Unsupported: With all of its reasons.
    """
    if config.impl == "auto" and config.attention_precision == "model":
        return
    # None and "auto" where the call decides, which may be 64 everywhere.
    named = getattr(config.method, "block", None)
    block: Block = 64 if named in (None, "auto") else named
    sides = block_sides(block)
    tokens = max(sides)
    q = torch.empty(1, tokens, 1, dim, dtype=dtype, device=device)
    lse = torch.empty(1, 1, tokens, device=device)
    mask = BlockMask.full(block, tokens, device)
    calls: dict[str, Any] = {
        "attention": ops.AttentionCall(
            q=q,
            k=q,
            v=q,
            mask=mask,
            key_valid=None,
            scale=1.0,
            precision=config.attention_precision,
        ),
        "banded_attention": ops.BandedCall(
            q=q,
            k=q,
            v=q,
            bands=BandMask((FULL,), tokens, TokenLayout((1, 1, tokens))),
            key_valid=None,
            scale=1.0,
        ),
        "row_lse": ops.AttentionCall(q=q, k=q, v=None, mask=None, key_valid=None, scale=1.0),
        "block_mass": ops.BlockMassCall(q=q, k=q, lse=lse, block=sides, key_valid=None, scale=1.0),
    }
    for op, call in calls.items():
        if config.impl == "auto":
            # Something computes anything, but not in any precision.
            asked = op == "attention"
        else:
            asked = any(impl.name == config.impl for impl in ops.implementations(op))
        if asked:
            ops.select(op, call, config.impl)
