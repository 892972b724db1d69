"""The dense attention of diffusers by different kernels, and its blocks compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.transformers.models import Model

# Names of diffusers, for models that call scaled_dot_product_attention themselves.
_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
STOCK = "native"


def faster_backends(model: Model, device: torch.device) -> list[str]:
    """Backends that may be faster than what diffusers takes by itself, and are installed."""
    if device.type != "cuda":
        return ["_native_math"]
    has_fa3 = importlib.util.find_spec("flash_attn_interface") is not None
    return (["_flash_3"] if has_fa3 and model.dispatches else []) + ["_native_cudnn"]


def other_backend(device: torch.device) -> str:
    """A kernel that shares no code with the ones above: its distance from them is rounding."""
    return "_native_flash" if device.type == "cuda" else STOCK


@contextmanager
def dense_backend(model: Model, transformer: Any, name: str) -> Iterator[None]:
    """Dense attention of ``transformer`` by the backend that diffusers calls ``name``."""
    if not model.dispatches:
        if name == STOCK:
            yield
            return
        with sdpa_kernel(_KERNELS[name]):
            yield
        return
    transformer.set_attention_backend(name)
    try:
        yield
    finally:
        # The call above also sets the default of the whole process.
        transformer.set_attention_backend(STOCK)


def compile_blocks(model: Model, transformer: Any, backend: str = "inductor") -> None:
    """Compiles the blocks one by one, where diffusers knows how by ``compile_repeated_blocks``."""
    if getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        return
    for name, *_ in model.stacks:
        for block in getattr(transformer, name):
            block.compile(fullgraph=True, backend=backend)
