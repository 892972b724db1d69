"""Re-wrapping a processor: the same code, with only its attention call swapped.

A model's own processor object keeps doing projections, norms, rotary embedding and output; a
subclass made here runs the very same code object with ``dispatch_attention_fn`` or
``F.scaled_dot_product_attention`` replaced, also in the helper functions that it calls. Nothing of
diffusers is copied or patched, and what upstream changes in its processors is inherited.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_sparse.processors.op import attend
from dit_sparse.processors.upstream import register_like, skips_scores, upstream_attention

if TYPE_CHECKING:
    from dit_sparse.processors.site import Site

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"


class _Current:
    """The site whose processor runs. A plain class because Dynamo traces neither contextvars nor
    thread-locals; while tracing, the compiler's own lock keeps threads apart."""

    def __init__(self) -> None:
        # On the object from the start: an attribute that appears makes the first graph stale.
        self.site: Site | None = None


class _ThreadCurrent(threading.local):
    site: Site | None = None


_traced, _eager = _Current(), _ThreadCurrent()


def _current_site(**unsupported: Any) -> Site:
    current = _traced if torch.compiler.is_compiling() else _eager
    site = current.site
    if site is None:
        raise RuntimeError("sparse attention was called outside its processor")
    if any(unsupported.values()):
        asked = ", ".join(f"{name}={value}" for name, value in unsupported.items() if value)
        raise NotImplementedError(
            "sparse attention replaces plain bidirectional self-attention; this processor asks for "
            + asked
        )
    return site


def _check_mask_kind(attn_mask: Any) -> None:
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise NotImplementedError(
            f"this model computes its own sparse attention ({type(attn_mask).__name__}); load it "
            "with dense attention, then sparse attention can replace that"
        )


def sparse_dispatch(
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
    site = _current_site(
        is_causal=is_causal,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        attention_kwargs=attention_kwargs,
    )
    _check_mask_kind(attn_mask)
    if skips_scores():
        processor = site.module.processor
        return upstream_attention(processor, query, key, value, attn_mask, scale, sdpa=False)[0]
    return attend(site, query, key, value, attn_mask, scale, sdpa=False)


def sparse_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for ``F.scaled_dot_product_attention``: ``[batch, heads, tokens, dim]``."""
    site = _current_site(is_causal=is_causal, enable_gqa=enable_gqa, dropout_p=dropout_p)
    _check_mask_kind(attn_mask)
    if skips_scores():
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, scale=scale)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attend(site, q, k, v, attn_mask, scale, sdpa=True).transpose(1, 2)


# torch.nn.functional with one function exchanged; what processors call ``F``.
_sparse_functional = types.ModuleType("torch.nn.functional")
vars(_sparse_functional).update(vars(functional), **{SDPA: sparse_sdpa})


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _swapped(function: types.FunctionType) -> types.FunctionType | None:
    """``function`` with its attention calls exchanged, or None if it makes none."""
    names, scope = set(_names(function.__code__)), function.__globals__
    swaps: dict[str, Any] = {}
    if DISPATCH in names and DISPATCH in scope:
        swaps[DISPATCH] = sparse_dispatch
    if SDPA in names:
        swaps |= {name: _sparse_functional for name in names if scope.get(name) is functional}
    for name in names - {function.__name__}:
        helper = scope.get(name)
        # Helpers of the same file only: further away lies code that serves other models too.
        if isinstance(helper, types.FunctionType) and helper.__globals__ is scope:
            exchanged = _swapped(helper)
            if exchanged is not None:
                swaps[name] = exchanged
    if not swaps:
        return None
    # With the original module's name Dynamo would guard on that module's globals, not on these.
    namespace = {**scope, **swaps, "__name__": "namedtuple_dit_sparse"}
    body = types.FunctionType(
        function.__code__,
        namespace,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    body.__kwdefaults__ = function.__kwdefaults__
    return body


@functools.cache
def _sparse_subclass(kind: Any, explicit: Callable[..., Any] | None) -> Any:
    call = kind.__call__
    swapped = explicit or _swapped(call)
    if swapped is None:
        raise NotImplementedError(
            f"{kind.__name__} calls neither {DISPATCH} nor F.{SDPA}; sparse attention cannot wrap "
            "it. Set the model's default processors first"
        )

    body: Callable[..., Any] = swapped

    class Sparse(kind):
        _dit_sparse_base = kind
        # An instance that was not made by rewrap() does as its base does.
        _dit_sparse_site: Site | None = None

        # Legacy attention modules drop every argument that is not in this signature, hence wraps.
        @functools.wraps(call)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self._dit_sparse_site is None:
                return call(self, *args, **kwargs)
            current = _traced if torch.compiler.is_compiling() else _eager
            previous = current.site
            current.site = self._dit_sparse_site
            try:
                return body(self, *args, **kwargs)
            finally:
                current.site = previous

    # At the end: others tell fused processors by how their names begin, as diffusers' tests do.
    Sparse.__name__ = Sparse.__qualname__ = f"{kind.__name__}Sparse"
    Sparse.__module__ = kind.__module__
    register_like(Sparse, kind)
    return Sparse


def rewrap(processor: Any, site: Site) -> Any:
    """A copy of ``processor`` whose attention call goes to ``site``; the original is untouched.

    Raises:
        NotImplementedError: If the processor makes no call that can be swapped.
    """
    kind: Any = type(processor)
    wrapped = copy.copy(processor)
    wrapped.__class__ = _sparse_subclass(kind, site.binding.family.explicit_call(kind))
    # Past setattr, which would make a processor that is a module a part of its own copy.
    vars(wrapped).update(_dit_sparse_site=site, _dit_sparse_original=processor)
    return wrapped


def unwrap(processor: Any) -> Any:
    """The processor that a re-wrapped one stands for; any other is returned as it is.

    What was set on the copy in the meantime goes with it: an attention backend, the parallel
    configuration, the scale of an image prompt.
    """
    base = getattr(type(processor), "_dit_sparse_base", None)
    if base is None:
        return processor
    original = vars(processor).get("_dit_sparse_original")
    if original is None:
        # diffusers makes new processors of the class that it finds (load_ip_adapter of FLUX).
        processor.__class__ = base
        return processor
    own = ("_dit_sparse_site", "_dit_sparse_original")
    vars(original).update({k: v for k, v in vars(processor).items() if k not in own})
    return original


def site_of(processor: Any) -> Site | None:
    """The site of a re-wrapped processor, or None for any other."""
    return getattr(processor, "_dit_sparse_site", None)
