"""The one opaque operator through which every sparse site runs.

torch.compile sees a single call without branches; which denoising step it is and whether the step
is dense is decided in Python inside, at every execution of a compiled graph too. The site is a
tensor because an int would be burnt into the graph, one graph a layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.processors.site import Site

_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register_site(site: Site) -> Tensor:
    """Makes ``site`` known to the operator; its handle is a 0-d int64 CPU tensor."""
    number = next(_numbers)
    _sites[number] = site
    return torch.tensor(number)


# A CUDA graph would replay the decisions of the step in which it was captured.
_tags = tuple(
    getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)
)


@torch.library.custom_op("dit_sparse::self_attention", mutates_args=(), tags=_tags)
def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    site: Tensor,
    timestep: Tensor | None,
    layout: Tensor,
    positions: Tensor | None,
    scale: float | None,
    sdpa: bool,
) -> Tensor:
    """Self-attention ``[batch, tokens, heads, dim]`` of the site that ``site`` names.

    Args:
        q: Queries ``[batch, tokens, heads, dim]``.
        k: Keys, same shape.
        v: Values, same shape.
        attn_mask: The model's own mask, see :func:`dit_sparse.processors.masks.read_mask`.
        site: Handle from :func:`register_site`.
        timestep: Falls during a generation.
        layout: Numbers from :meth:`Family.encode`, int64 on the CPU. A tensor for the same reason
            as the site: ints would make graphs of their own for every resolution.
        positions: Position ids of packed families, which hold the grid in their values.
        scale: Factor on the scores.
        sdpa: Whether the model calls scaled_dot_product_attention itself and not diffusers'
            dispatcher; dense steps do as it does.
    """
    owner = _sites.get(int(site))
    if owner is None:
        raise RuntimeError(
            "this sparse attention site no longer exists: its processor was removed while a "
            "compiled graph still calls it; call torch.compiler.reset() and compile again"
        )
    return owner.attend(
        q, k, v, attn_mask, timestep, layout.tolist(), positions, scale, sdpa
    ).contiguous()


@self_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    site: Tensor,
    timestep: Tensor | None,
    layout: Tensor,
    positions: Tensor | None,
    scale: float | None,
    sdpa: bool,
) -> Tensor:
    return q.new_empty(q.shape)


def attend(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    sdpa: bool,
) -> Tensor:
    """Self-attention of ``site``, through the operator where somebody looks at operators.

    Compilers do, and autograd, profilers and tensors of other kinds. Otherwise its dispatch is left
    out, a good part of what a small call costs the host. Arguments as there.
    """
    scope = site.scope
    if (
        torch.compiler.is_compiling()
        or type(q) is not Tensor
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or torch.autograd._profiler_enabled()
    ):
        return self_attention(
            q, k, v, attn_mask, site.handle, scope.timestep, scope.layout, scope.positions, scale,
            sdpa,
        )  # fmt: skip
    return site.attend(
        q, k, v, attn_mask, scope.timestep, scope.layout.tolist(), scope.positions, scale, sdpa
    ).contiguous()


NO_GRADIENT = (
    "sparse attention is for inference and has no gradient; take it off the model before training "
    "(remove() of its processor, or disable_sparse_attention), and put it on again afterwards"
)


def _backward(context: Any, gradient: Tensor) -> None:
    raise NotImplementedError(NO_GRADIENT)


self_attention.register_autograd(_backward)
