"""Writes docs/composition.md: ``python tests/processors/composition.py > docs/composition.md``."""

from __future__ import annotations

import diffusers
from features import FAMILIES, FEATURES, Feature

INTRODUCTION = """\
# Together with everything else

Written by `python tests/processors/composition.py` with diffusers {version}.

Each cell of the tables is a test: a pipeline with a tiny model of that family gets the feature
first and sparse attention then, and the other way round. In both orders the dense steps equal, bit
for bit, those of the same pipeline without sparse attention; a full mask of our kernels equals it
up to rounding; a sparse method is sparse in both orders and gives the same result in both; and once
sparse attention is removed, the feature alone is left, bit for bit. `strict=True` is on throughout,
so whatever takes sparse attention off without being asked fails the test.

**✓** both orders. **–** upstream has not got it for this family, which is tested too.
"""

DETAILS = """
## What to know

**TaylorSeer on Wan, CogVideoX and LTX-Video.** The identifiers that
`TaylorSeerCacheConfig` has by default match no attention module of these models (they are called
`attn1`), so upstream caches nothing and says nothing. Sparse attention warns and names the
`cache_identifiers` that match; with `strict=True` it raises.

**Pyramid attention broadcast and guidance in two passes.** The state of this cache does not tell
the passes of a step apart. Pipelines that guide in two passes (Wan, Qwen-Image, HunyuanVideo with
`true_cfg_scale`, FLUX.1 with a negative prompt) then get, for the unconditional pass, the attention
output of the conditional one, with or without sparse attention. Sparse attention warns; with
`strict=True` it raises. One pass a step (guidance off) and both passes in one batch (CogVideoX,
LTX-Video) are right.

**Caches and sparse attention want the same time.** A cached step never reaches attention, and
schedules go by denoising steps and not by calls: a search or refresh that was due in a cached step
is made up for at the next call. Caches of attention outputs (TaylorSeer, pyramid attention
broadcast) save exactly what sparse attention makes cheap. FasterCache alternates between two batch
sizes, and masks are searched again after each change.

**Text KV cache** (`TextKVCacheConfig`, for NucleusMoE-Image alone) works in both orders too.

**Fused projections and image prompts** put other processors in the place of ours. They are wrapped
at once, so sparse attention stays on. Processors that you set yourself, with `set_attn_processor`,
take it off.

**Attention backends.** `set_attention_backend` decides how dense steps and cross-attention are
computed, before or after sparse attention was put on. Sparse steps use the kernel that `impl`
names.

**Saving.** `save_pretrained` writes weights alone, the same ones as without sparse attention. A
deep copy is sparse like its original, with state of its own, but knows no pipeline.

**torch.compile** in either order; see also the graph counts in
[families](families.md). The tests use the `eager` backend of torch.compile, which runs the traced
graphs as they are.

**More than one GPU**: see [parallel](parallel.md).
"""


def to_markdown() -> str:
    """The text of docs/composition.md."""
    lines = [INTRODUCTION.format(version=diffusers.__version__)]
    remarks: dict[str, int] = {}
    for group, features in FEATURES.items():
        lines += [f"## {group}", "", f"| | {' | '.join(FAMILIES)} |"]
        lines += ["|---" * (len(FAMILIES) + 1) + "|"]
        for feature in features:
            cells = [cell(feature, family, remarks) for family in FAMILIES]
            lines += [f"| {feature.name}<br>`{feature.call}` | {' | '.join(cells)} |"]
        lines += [""]
    lines += [f"{number}. {remark}" for remark, number in remarks.items()]
    return "\n".join(lines) + "\n" + DETAILS


def cell(feature: Feature, family: str, remarks: dict[str, int]) -> str:
    """Mark of one test, with the number of its remark; new remarks are added."""
    mark = "–" if family in feature.absent else "✓"
    remark = feature.absent.get(family) or feature.notes.get(family) or feature.notes.get("*")
    if remark is None:
        return mark
    return f"{mark} ({remarks.setdefault(remark, len(remarks) + 1)})"


if __name__ == "__main__":
    print(to_markdown(), end="")
