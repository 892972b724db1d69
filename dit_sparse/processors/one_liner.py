"""Makes ``model.set_attn_processor(SparseProcessor())`` work: the one patch of diffusers.

diffusers puts one processor object on every attention module, cross-attention included, and
discards the originals. Here the method first looks whether it was given a SparseProcessor, which
then binds itself; everything else goes to the method as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers.models.attention import AttentionMixin

from dit_sparse.processors.binding import binding_of


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
        original(self, processor)
        # Our processors may be among those just set (model.attn_processors, edited and put back).
        binding = binding_of(self)
        if binding is not None and not binding.is_active():
            release(self)

    set_attn_processor._dit_sparse_original = original  # type: ignore[attr-defined]
    AttentionMixin.set_attn_processor = set_attn_processor  # type: ignore[method-assign]


def unpatch() -> None:
    """Restores diffusers' own method."""
    method = AttentionMixin.set_attn_processor
    AttentionMixin.set_attn_processor = getattr(  # type: ignore[method-assign]
        method, "_dit_sparse_original", method
    )
