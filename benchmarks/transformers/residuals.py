"""Residuals kept as they would be at full depth.

A method that adapts its residuals to the memory at hand has plenty of it with few layers. It is
timed with the precision and the place that all layers would leave it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.transformers.measure import Bench
from dit_sparse import Method
from dit_sparse.methods.residual import ResidualMethod
from dit_sparse.methods.residual_plan import DEVICE_SHARE, BranchShape, ResidualPlan
from dit_sparse.methods.transfer import transfer_for


def settled(method: Method, bench: Bench) -> tuple[Method, str | None]:
    """``method`` with its residuals as they would be at full depth, and a line that says how.

    Args:
        method: Any method; those that keep no adapting residual come back as they are.
        bench: The transformer with few layers.
    """
    if not isinstance(method, ResidualMethod) or not method.adapt:
        return method, None
    model, config = bench.model, bench.transformer.config
    heads, dim = config.num_attention_heads, config.attention_head_dim
    shape = BranchShape(model.batch, model.tokens, heads, dim, bench.dtype)
    weights = model.block_bytes(bench.transformer) * bench.ratio
    # At the first attention call its queries, keys, values and the block's input are there too.
    free = _free_without_blocks(bench) - weights - 4 * shape.residual_bytes("native")
    plan = ResidualPlan(
        method.residual_options,
        model.depth,
        (),
        tuple((branch, shape) for branch in model.branches),
        bench.device,
        int(max(0, free) * DEVICE_SHARE),
        transfer_for(bench.device).host_budget(),
        method.residuals_kept(),
        method.row_statistics,
    )
    fitting = plan.adapted()
    if fitting is None:
        # Without room the method keeps none.
        return replace(method, budget_gb=0.0), f"at full depth none fits: {plan.describe()}"
    options, held = fitting.options, len(fitting.held_layers)
    few = round(held / bench.ratio)
    changed = replace(
        method,
        precision=options.precision,
        offload=options.offload,
        layers=None if held == model.depth else max(1, few),
        adapt=False,
    )
    return changed, f"at full depth {fitting.describe()}"


def _free_without_blocks(bench: Bench) -> int:
    """Device memory that is free beside everything but the blocks of ``bench``."""
    if bench.device.type != "cuda":
        return 1 << 40
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + cached + bench.model.block_bytes(bench.transformer)
