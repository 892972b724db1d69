"""The one opaque operator through which every sparse site runs.

torch.compile sees a single call without branches; which denoising step it is and whether the step
is dense is decided in Python inside, at every execution of a compiled graph too. The site is a
tensor because an int would be burnt into the graph, one graph a layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout

if TYPE_CHECKING:
    from dit_sparse.processors.binding import Site

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
    layout: list[int],
    scale: float | None,
) -> Tensor:
    """Self-attention ``[batch, tokens, heads, dim]`` of the site that ``site`` names.

    Args:
        q: Queries ``[batch, tokens, heads, dim]``.
        k: Keys, same shape.
        v: Values, same shape.
        attn_mask: The model's own mask: None or bool ``[batch, 1, 1, tokens]``.
        site: Handle from :func:`register_site`.
        timestep: The transformer's timestep argument.
        layout: Grid (frames, height, width), text tokens, 1 if the text comes first.
        scale: Factor on the scores.
    """
    owner = _sites.get(int(site))
    if owner is None:
        raise RuntimeError(
            "this sparse attention site no longer exists: its processor was removed while a "
            "compiled graph still calls it; call torch.compiler.reset() and compile again"
        )
    tokens = TokenLayout(
        (layout[0], layout[1], layout[2]), layout[3], "text_video" if layout[4] else "video_text"
    )
    return owner.attend(q, k, v, attn_mask, timestep, tokens, scale).contiguous()


@self_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    site: Tensor,
    timestep: Tensor | None,
    layout: list[int],
    scale: float | None,
) -> Tensor:
    return q.new_empty(q.shape)
