"""Sparse attention for 🤗 diffusers video and image transformers, without retraining."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "SparseProcessor": "processors.processor",
    "enable_sparse_attention": "processors.processor",
    "disable_sparse_attention": "processors.processor",
    "context_parallel_plan": "processors.parallel_plan",
    "SparseConfig": "config",
    "Method": "methods.base",
    "AdaSpa": "methods.adaspa",
    "MMInference": "methods.mminference",
    "list_methods": "methods",
    "list_families": "processors.family",
    "BlockMask": "mask",
    "TokenLayout": "layout",
    "Ordering": "layout",
    "Schedule": "schedule",
    "Step": "schedule",
    "Phase": "schedule",
    "Report": "processors.report",
}
__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    # Redundant aliases mark re-exports for type checkers.
    from dit_sparse.config import SparseConfig as SparseConfig
    from dit_sparse.layout import Ordering as Ordering
    from dit_sparse.layout import TokenLayout as TokenLayout
    from dit_sparse.mask import BlockMask as BlockMask
    from dit_sparse.methods import list_methods as list_methods
    from dit_sparse.methods.adaspa import AdaSpa as AdaSpa
    from dit_sparse.methods.base import Method as Method
    from dit_sparse.methods.mminference import MMInference as MMInference
    from dit_sparse.processors.family import list_families as list_families
    from dit_sparse.processors.parallel_plan import context_parallel_plan as context_parallel_plan
    from dit_sparse.processors.processor import SparseProcessor as SparseProcessor
    from dit_sparse.processors.processor import disable_sparse_attention as disable_sparse_attention
    from dit_sparse.processors.processor import enable_sparse_attention as enable_sparse_attention
    from dit_sparse.processors.report import Report as Report
    from dit_sparse.schedule import Phase as Phase
    from dit_sparse.schedule import Schedule as Schedule
    from dit_sparse.schedule import Step as Step


def __getattr__(name: str) -> Any:
    # Exports load on first use, so that importing a kernel does not import diffusers.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dit_sparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dit_sparse.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
