"""MoA: a span for every head, chosen together under one budget by integer programming.

Source: MoA, arXiv 2406.14909, sections 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_sparse.kernels.ops import work_dtype
from dit_sparse.layout import TokenLayout, tile_ordering_on
from dit_sparse.mask import PackedMask, block_count
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.scored import Tiled, check_count, check_share
from dit_sparse.schedule import Phase, Schedule

Span = tuple[float, float, float]
# Rounding of densities that sum up to the budget exactly.
_SLACK = 1e-6
# How far from the best choice the solver may stop.
_GAP = 1e-3


@dataclass(frozen=True)
class MoA(Tiled):
    """Heads see as far as suits them: some across space, some across time, some little, a few all.

    A span is how far a query sees to either side along (frames, height, width), as shares of the
    grid; a pair of blocks is kept where the gap between their bounding boxes is within it on every
    axis. In the last warm-up step each layer computes its attention under every span and notes the
    relative squared error ``|O_span - O|^2 / |O|^2`` of each head. Then each head gets one span:

        minimise ``sum_h loss[h, c_h]`` subject to ``mean_h cost[c_h] <= 1 - sparsity``

    over the heads of the model (or of a layer) at once, by branch and bound. The cost of a span is
    its density among video blocks.

    The paper measures the loss of a span by the gradients of a language model's loss on calibration
    text and lets spans grow with the length, ``alpha + beta * length``; here shares of the grid are
    beta, and alpha is the block. Trying the spans costs the sum of their densities in dense
    attention, and the choice a second for 1,600 heads, several with ``distinct``; both once a
    generation, or never with a ``plan`` from :func:`dit_sparse.eval.moa.plan_spans`.

    Attributes:
        sparsity: Mean share of video pairs that heads skip at least, in [0, 1).
        spans: What heads choose from.
        scope: Whether the budget is that of the model, or of every layer by itself.
        distinct: Most different spans in a layer, or None for any number.
        plan: A span (its place in ``spans``) for each head of each layer; None chooses online.
        warmup: Dense steps, of which the last one tries the spans; without a warm-up, one step.

    Raises:
        ValueError: On a value outside these ranges; on a call, if even the shortest span exceeds
            the budget or ``plan`` does not fit the model.
    """

    name = "moa"

    sparsity: float = 0.7
    spans: tuple[Span, ...] = (
        (0.0, 0.0, 0.0),
        (0.1, 0.1, 0.1),
        (0.25, 0.25, 0.25),
        (0.0, 1.0, 1.0),
        (1.0, 0.05, 0.05),
        (1.0, 0.25, 0.25),
        (1.0, 1.0, 1.0),
    )
    scope: Literal["model", "layer"] = "model"
    distinct: int | None = None
    plan: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Schedule((self.warmup,))
        check_share("sparsity", self.sparsity, least=0, below=1)
        if not self.spans or any(len(span) != 3 for span in self.spans):
            raise ValueError(f"spans must be (frames, height, width) each, got {self.spans!r}")
        for span in self.spans:
            for share in span:
                check_share("a span", share, least=0)
        if self.scope not in ("model", "layer"):
            raise ValueError(f"scope must be 'model' or 'layer', got {self.scope!r}")
        if self.distinct is not None:
            check_count("distinct", self.distinct)
        places = {place for heads in self.plan or () for place in heads}
        if not places <= set(range(len(self.spans))):
            raise ValueError(
                f"plan must hold places in spans, 0 to {len(self.spans) - 1}, got {sorted(places)}"
            )

    @classmethod
    def exact(cls) -> MoA:
        return cls(sparsity=0.0, spans=((1.0, 1.0, 1.0),), warmup=0)

    def attend(self, call: Call) -> Tensor:
        if self.plan is not None:
            return super().attend(call)
        self._check_budget(call)
        phase = Schedule((self.warmup,)).phase(call.step, call.memory.get("found"))
        if phase is Phase.DENSE:
            call.record(phase)
            return call.dense()
        order = self.order(call)
        moved = call.ordered(order)
        if phase is Phase.SEARCH:
            out = call.dense()
            stop = call.search_watch.start(call.q.device)
            losses = self.losses(moved, out if order is None else order.apply(out))
            losses = call.heads.all_heads(losses[None])[0]
            call.memory["losses"], call.memory["found"] = losses, call.step.index
            call.branch_shared.setdefault("losses", {})[call.layer] = losses
            call.branch_shared["cost"] = self._cost(call)
            stop()
            call.record(phase)
            return out
        if "mask" not in call.memory:
            call.memory["mask"] = self.find(moved)
        mask = call.memory["mask"]
        call.record(phase, mask)
        out = moved.attention(mask).out
        return out if order is None else order.undo(out)

    def find(self, call: Call) -> PackedMask:
        keep, _ = span_masks(call.layout, self.tile, self.block, self.spans)
        spans = self._chosen(call)
        chosen = keep[[spans[number] for number in call.heads.own]].to(call.q.device)
        return PackedMask.from_dense(chosen[None], self.block, call.layout.tokens)

    def losses(self, call: Call, dense: Tensor) -> Tensor:
        """Relative squared error of each head under each span, ``[heads, spans]``.

        Args:
            call: With its tokens in :meth:`order`.
            dense: The model's own attention in the same order.
        """
        keep, _ = span_masks(call.layout, self.tile, self.block, self.spans)
        work = work_dtype(dense.dtype)
        losses = []
        for span in keep:
            mask = PackedMask.from_dense(
                span[None, None].to(call.q.device), self.block, call.layout.tokens
            )
            error = (call.attention(mask).out.to(work) - dense.to(work)).square()
            if call.key_valid is not None:
                error = error.masked_fill(~call.key_valid[..., None, None], 0)
            losses.append(error.sum((0, 1, 3)))
        size = dense.to(work).square()
        if call.key_valid is not None:
            size = size.masked_fill(~call.key_valid[..., None, None], 0)
        return torch.stack(losses, -1) / size.sum((0, 1, 3)).clamp_min(1e-30)[:, None]

    def _chosen(self, call: Call) -> list[int]:
        """The span of every head of this layer, on whatever device it is."""
        if self.plan is not None:
            heads = call.heads.total
            if len(self.plan) != call.layers or len(self.plan[call.layer]) != heads:
                raise ValueError(
                    f"plan must have {call.layers} layers of {heads} heads, got "
                    f"{[len(heads) for heads in self.plan]}"
                )
            return list(self.plan[call.layer])
        choice = call.branch_shared.setdefault("choice", {})
        if call.layer not in choice:
            tables = call.branch_shared["losses"]
            # Layers that searched late, as a step cache may have them do, share what they have.
            layers = sorted(set(tables) - set(choice)) if self.scope == "model" else [call.layer]
            # The one read-back of a generation.
            losses = torch.stack([tables[layer] for layer in layers]).double().cpu().numpy()
            found = choose_spans(losses, self._cost(call), 1 - self.sparsity, self.distinct)
            choice.update({x: heads.tolist() for x, heads in zip(layers, found, strict=True)})
        return choice[call.layer]

    def _check_budget(self, call: Call) -> None:
        least = self._cost(call).min()
        if least > 1 - self.sparsity + _SLACK:
            raise ValueError(
                f"sparsity {self.sparsity} allows heads a density of {1 - self.sparsity:.3f}, but "
                f"the shortest of the spans keeps {least:.3f} of {call.layout}; lower it or add a "
                "shorter span"
            )

    def _cost(self, call: Call) -> NDArray[np.float64]:
        return span_masks(call.layout, self.tile, self.block, self.spans)[1]


@lru_cache(maxsize=32)
def span_masks(
    layout: TokenLayout, tile: tuple[int, int, int] | None, block: int, spans: tuple[Span, ...]
) -> tuple[Tensor, NDArray[np.float64]]:
    """Blocks that each span keeps, with all text, and its density among the video blocks.

    Args:
        layout: What the tokens are.
        tile: Order of the video tokens.
        block: Tokens in a block.
        spans: Shares of the grid seen to either side.

    Returns:
        ``[spans, blocks, blocks]`` bool on the CPU, and densities ``[spans]``.
    """
    total, video = block_count(layout.tokens, block), video_blocks(layout, block)
    keep = torch.ones(len(spans), total, total, dtype=torch.bool)
    if not video:
        # Text shares the only block: everything is kept and nothing is charged.
        return keep, np.zeros(len(spans))
    order = tile_ordering_on(layout, tile or (1, 1, layout.grid[2]), torch.device("cpu"))
    tokens = min(video * block, layout.video)
    coords = layout.coords()[order.perm[:tokens]]
    # A ragged last block repeats its last token.
    place = torch.arange(video * block).clamp(max=tokens - 1)
    boxes = coords[place].view(video, block, 3)
    low, high = boxes.amin(1), boxes.amax(1)
    gap = torch.maximum(low[None] - high[:, None], low[:, None] - high[None]).clamp(min=0)
    for number, span in enumerate(spans):
        reach = torch.tensor(span) * torch.tensor(layout.grid)
        keep[number, :video, :video] = (gap <= reach).all(-1)
    free = PackedMask.from_dense(keep[None, :, :video, :video], block, tokens)
    return keep, free.head_density[0].double().numpy()


def choose_spans(
    losses: NDArray[np.float64],
    cost: NDArray[np.float64],
    budget: float,
    distinct: int | None = None,
) -> NDArray[np.int64]:
    """One span per head, of least total loss under a mean cost.

    Args:
        losses: ``[layers, heads, spans]``.
        cost: Density of every span, ``[spans]``.
        budget: Mean cost over all heads at most.
        distinct: Most different spans in a layer, or None.

    Returns:
        Places of the spans, ``[layers, heads]``.

    Raises:
        ValueError: If no choice is within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, hstack, identity, kron

    layers, heads, spans = losses.shape
    one = kron(identity(layers * heads), np.ones((1, spans)))
    price = np.tile(cost, layers * heads)[None] / (layers * heads)
    chosen = layers * heads * spans
    used = layers * spans if distinct is not None else 0
    pad = coo_array((layers * heads, used))
    rows = [
        LinearConstraint(hstack([one, pad]).tocsr(), 1, 1),
        LinearConstraint(np.hstack([price, np.zeros((1, used))]), -np.inf, budget + _SLACK),
    ]
    if distinct is not None:
        # A head may take a span only where its layer pays for it.
        paid = kron(identity(layers), kron(np.ones((heads, 1)), identity(spans)))
        rows.append(LinearConstraint(hstack([identity(chosen), -paid]).tocsr(), -np.inf, 0))
        sums = kron(identity(layers), np.ones((1, spans)))
        count = hstack([coo_array((layers, chosen)), sums]).tocsr()
        rows.append(LinearConstraint(count, -np.inf, distinct))
    # Losses span orders of magnitude between heads; the solver's tolerances are absolute.
    scale = losses.max() or 1.0
    found = milp(
        np.concatenate([losses.ravel() / scale, np.zeros(used)]),
        integrality=np.ones(chosen + used),
        bounds=Bounds(0, 1),
        constraints=rows,
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise ValueError(
            f"no choice of spans with densities {np.round(cost, 3).tolist()} keeps a mean of "
            f"{budget:.3f}: {found.message}"
        )
    return found.x[:chosen].reshape(layers, heads, spans).argmax(-1)
