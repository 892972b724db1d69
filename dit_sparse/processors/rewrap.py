"""Re-wrapping a processor: the same code, with only its attention call swapped.

A model's own processor object keeps doing projections, norms, rotary embedding and output; a
subclass made here runs the very same code object with ``dispatch_attention_fn`` replaced. Nothing
of diffusers is copied or patched, and what upstream changes in its processors is inherited.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.processors.op import self_attention

if TYPE_CHECKING:
    from dit_sparse.processors.binding import Site


class _Current:
    """The site whose processor runs. A plain class because Dynamo traces neither contextvars nor
    thread-locals; while tracing, the compiler's own lock keeps threads apart."""

    def __init__(self) -> None:
        # An attribute of the instance from the start: Dynamo guards on whether it is there.
        self.site: Site | None = None


class _ThreadCurrent(threading.local):
    site: Site | None = None


_traced, _eager = _Current(), _ThreadCurrent()


def _sparse_dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Stands in for ``dispatch_attention_fn`` (diffusers 0.36 and newer; same parameters).

    The backend and the parallel configuration are read from the processor inside the operator.
    """
    current = _traced if torch.compiler.is_compiling() else _eager
    site = current.site
    if site is None:
        raise RuntimeError("sparse attention was called outside its processor")
    if is_causal or enable_gqa or dropout_p or attention_kwargs:
        raise NotImplementedError(
            "sparse attention replaces plain bidirectional self-attention; this processor asks "
            f"for is_causal={is_causal}, enable_gqa={enable_gqa}, dropout_p={dropout_p}, "
            f"attention_kwargs={attention_kwargs}"
        )
    scope = site.scope
    return self_attention(
        query, key, value, attn_mask, site.handle, scope.timestep, scope.layout, scale
    )


@functools.cache
def _sparse_subclass(kind: Any) -> Any:
    call = kind.__call__
    namespace = dict(call.__globals__)
    if "dispatch_attention_fn" not in namespace:
        raise NotImplementedError(
            f"{kind.__name__} does not call dispatch_attention_fn; sparse attention cannot wrap it"
        )
    # With the original module's name Dynamo would guard on that module's globals, not on these.
    namespace["__name__"] = "namedtuple_dit_sparse"
    namespace["dispatch_attention_fn"] = _sparse_dispatch
    body = types.FunctionType(
        call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__
    )
    body.__kwdefaults__ = call.__kwdefaults__

    class Sparse(kind):
        # Legacy attention modules drop every argument that is not in this signature, hence wraps.
        @functools.wraps(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            current = _traced if torch.compiler.is_compiling() else _eager
            previous = current.site
            current.site = self._dit_sparse_site
            try:
                return body(self, *args, **kwargs)
            finally:
                current.site = previous

    Sparse.__name__ = Sparse.__qualname__ = f"Sparse{kind.__name__}"
    Sparse.__module__ = kind.__module__
    return Sparse


def rewrap(processor: Any, site: Site) -> Any:
    """A copy of ``processor`` whose attention call goes to ``site``; the original is untouched.

    Raises:
        NotImplementedError: If the processor makes no call that can be swapped.
    """
    wrapped = copy.copy(processor)
    wrapped.__class__ = _sparse_subclass(type(processor))  # type: ignore[arg-type]
    wrapped._dit_sparse_site = site
    return wrapped


def site_of(processor: Any) -> Site | None:
    """The site of a re-wrapped processor, or None for any other."""
    return getattr(processor, "_dit_sparse_site", None)
