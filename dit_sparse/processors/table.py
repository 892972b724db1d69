"""The list of diffusers' transformers, supported and refused, as ``docs/families.md`` prints it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dit_sparse.processors.family import list_families
from dit_sparse.processors.refused import REFUSED

# The pipelines that the tests run with each class, and the classes that they compile. Every class
# is tested by itself; the tests compare these lists with what they do.
IN_PIPELINES: dict[str, tuple[str, ...]] = {
    "AllegroTransformer3DModel": ("AllegroPipeline",),
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline",),
    "ChromaTransformer2DModel": ("ChromaPipeline",),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    "CogView4Transformer2DModel": ("CogView4Pipeline",),
    "FluxTransformer2DModel": ("FluxPipeline", "FluxKontextPipeline"),
    "HunyuanVideo15Transformer3DModel": ("HunyuanVideo15Pipeline",),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline",),
    "LTXVideoTransformer3DModel": (
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
    ),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline",),
    "MochiTransformer3DModel": ("MochiPipeline",),
    "PixArtTransformer2DModel": ("PixArtAlphaPipeline",),
    "QwenImageTransformer2DModel": ("QwenImagePipeline",),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline",),
    "SkyReelsV2Transformer3DModel": ("SkyReelsV2DiffusionForcingPipeline",),
    "WanTransformer3DModel": ("WanPipeline", "WanImageToVideoPipeline"),
    "ZImageTransformer2DModel": ("ZImagePipeline",),
}
COMPILED: tuple[str, ...] = (
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
    "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "MochiTransformer3DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
)

INTRODUCTION = """\
# Transformers

Written by `dit-sparse families --markdown` with diffusers {version}.

```python
from dit_sparse import SparseProcessor, enable_sparse_attention

pipe.transformer.set_attn_processor(SparseProcessor())  # where the model has the method
enable_sparse_attention(pipe)  # always
SparseProcessor().install(pipe.transformer)  # always, one transformer
```

`set_attn_processor` is a method of diffusers that not every model has. Without it Python raises
`AttributeError: '...' object has no attribute 'set_attn_processor'`; the two other forms do the
same thing and work on every model of the first table. Knowing the pipeline has an advantage: its
scheduler tells the number of steps.

*Tokens* is what the main self-attention sees, in order. The image or video is the part that
becomes sparse; everything beside it stays exact: text, references, history, registers, padding
that takes part. *Tested*: every class runs tiny models through all-dense steps (equal to upstream
bit for bit), through a full mask of our kernels (equal up to rounding), and over more than a
hundred shapes; beside that, *compile* compares the number of graphs with upstream's, and the
named pipelines run whole generations.

The newest of these classes are missing from older versions of diffusers; `dit-sparse families`
marks those that the installed one lacks, and [mirror.md](mirror.md) has what was tested with it.
"""
METHOD_MARKS = {True: "yes", False: "no", None: "not in this diffusers"}
REFUSALS = """
## Refused

Sparse attention raises `ValueError` with the reason. A transformer in neither table, from a newer
diffusers, is refused with the list of supported ones.
"""


@dataclass(frozen=True)
class Row:
    """One supported transformer class.

    Attributes:
        model: Class name.
        adapter: File under ``dit_sparse/processors``.
        tokens: What its main self-attention sees, in order.
        has_method: Whether it has ``set_attn_processor``; None if diffusers lacks the class.
        tested: What it is tested in beside the tests that all classes go through.
    """

    model: str
    adapter: str
    tokens: str
    has_method: bool | None
    tested: tuple[str, ...]


def family_rows() -> list[Row]:
    """The supported transformers, by class name."""
    classes = transformer_classes()
    rows = []
    for model, family in sorted(list_families().items()):
        compiled = ("compile",) if model in COMPILED else ()
        kind = classes.get(model)
        rows.append(
            Row(
                model,
                type(family).__module__.rpartition(".")[2],
                family.tokens,
                None if kind is None else hasattr(kind, "set_attn_processor"),
                compiled + IN_PIPELINES.get(model, ()),
            )
        )
    return rows


@lru_cache(maxsize=1)
def transformer_classes() -> dict[str, Any]:
    """Every class of diffusers' transformers, by name."""
    import diffusers.models.transformers as package

    modules = (
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    )
    return {
        name: kind
        for module in modules
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and kind.__module__ == module.__name__
    }


def to_markdown() -> str:
    """The text of ``docs/families.md``."""
    import diffusers

    lines = [INTRODUCTION.format(version=diffusers.__version__)]
    lines += ["| transformer | tokens | `set_attn_processor` | adapter | also tested in |"]
    lines += ["|---|---|---|---|---|"]
    for row in family_rows():
        adapter = f"[{row.adapter}](../dit_sparse/processors/{row.adapter}.py)"
        method, tested = METHOD_MARKS[row.has_method], ", ".join(row.tested)
        cells = (row.model, row.tokens, method, adapter, tested)
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    lines += [REFUSALS, "| transformer | why |", "|---|---|"]
    lines += [f"| {model} | {reason} |" for model, reason in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"
