"""Makes ``model.set_attn_processor(SparseProcessor())`` work: the one patch of diffusers.

diffusers puts one processor object on every attention module, cross-attention included, and
discards the originals. Here the method first looks whether it was given a SparseProcessor, which
then binds itself; everything else goes to the method as it was.

Features of diffusers set processors through the same method: fused projections (CogVideoX, SD3) and
image prompts. Those are wrapped at once, so that sparse attention stays on; processors that a user
sets take it off.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from diffusers.models.attention import AttentionMixin

from dit_sparse.processors.binding import binding_of
from dit_sparse.processors.rewrap import site_of, unwrap


def patch(kind: type[Any], release: Callable[[Any], None]) -> None:
    """Extends ``AttentionMixin.set_attn_processor``; a second call changes nothing.

    Args:
        kind: The class whose objects install themselves, ``SparseProcessor``.
        release: Takes sparse attention off a model whose processors were all replaced.
    """
    original = AttentionMixin.set_attn_processor
    if hasattr(original, "_dit_sparse_original"):
        return

    @functools.wraps(original)
    def set_attn_processor(self: Any, processor: Any) -> None:
        if isinstance(processor, kind):
            processor.install(self)
            return
        if isinstance(processor, dict) and any(isinstance(p, kind) for p in processor.values()):
            raise ValueError(
                "a SparseProcessor finds the layers of a model itself: pass it alone, as in "
                "model.set_attn_processor(SparseProcessor(...)), with dense_layers=(...) for those "
                "that stay dense"
            )
        binding = binding_of(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if binding is not None and caller.partition(".")[0] == "diffusers":
            original(self, _plain(processor))
            binding.adopt()
            return
        # Our processors may be among those just set (model.attn_processors, edited and put back).
        original(self, _plain(processor, keep=binding))
        if binding is not None and not binding.is_active():
            release(self)

    set_attn_processor._dit_sparse_original = original  # type: ignore[attr-defined]
    AttentionMixin.set_attn_processor = set_attn_processor  # type: ignore[method-assign]


def _plain(processor: Any, keep: Any = None) -> Any:
    """``processor``, one or a dict of them, without wrappings of ours except those of ``keep``."""
    if not isinstance(processor, dict):
        return unwrap(processor)
    for name, one in processor.items():
        site = site_of(one)
        if site is None or keep is None or site.binding is not keep:
            # In place: diffusers empties the dict that it is given, and callers may rely on it.
            processor[name] = unwrap(one)
    return processor


def unpatch() -> None:
    """Restores diffusers' own method."""
    method = AttentionMixin.set_attn_processor
    AttentionMixin.set_attn_processor = getattr(  # type: ignore[method-assign]
        method, "_dit_sparse_original", method
    )
