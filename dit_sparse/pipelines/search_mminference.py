"""The offline search of MMInference: what each head computes best for the same time.

Source: MMInference (arXiv 2504.16083), algorithm 4 and appendix C.5: all candidates are brought to
equal measured cost, then every head takes the one whose attention *output* is nearest to dense on
one calibration sample: first a pattern for each pair of modalities, then the boundary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.ops import Attended
from dit_sparse.mask import BlockMask
from dit_sparse.methods.base import Call, ModelIdentity
from dit_sparse.methods.mminference import MMInference
from dit_sparse.methods.modality_parts import (
    BOUNDARIES,
    Part,
    Parts,
    attend_parts,
    attend_side,
    modality_ranges,
)
from dit_sparse.methods.pattern_table import (
    A_SHAPE,
    GRID,
    KINDS,
    LINES,
    VERTICAL_SLASH,
    HeadPatterns,
    Pattern,
    PatternTable,
    pair_count,
)
from dit_sparse.pipelines.latency import match_cost, relative_cost
from dit_sparse.pipelines.observe import observe_step

# See :func:`relative_cost`.
Measure = Callable[[Callable[[], object], Callable[[], object], torch.device], tuple[float, float]]


@dataclass(frozen=True)
class Candidate:
    """A pattern at the density at which it costs what all cost.

    Attributes:
        boundary: One of ``BOUNDARIES``.
        pattern: The pattern.
        cost: Measured time of one layer with it on all heads, over that of the A-shape; None if it
            takes longer at every density tried, so that it is no candidate.
    """

    boundary: str
    pattern: Pattern
    cost: float | None


def search_patterns(
    pipe: Any,
    method: MMInference,
    arguments: Mapping[str, Any],
    *,
    step: float = 0.5,
    provenance: Mapping[str, Any] | None = None,
    measure: Measure = relative_cost,
    on_layer: Callable[[int, int], None] | None = None,
) -> PatternTable:
    """Finds the pattern of every head of a pipeline's transformer.

    The cost that all candidates get is that of the A-shape at the method's sparsity.

    Args:
        pipe: A diffusers pipeline with one supported transformer at work in the step looked at.
        method: Sparsity, blocks, strides, modalities; its table is not read.
        arguments: Of the pipeline's call: the calibration sample.
        step: Which denoising step to look at, as a share of all.
        provenance: What else to note in the table: model, sample, machine.
        measure: Times one function beside another.
        on_layer: Called with (layers done, layers) after each.

    Raises:
        ValueError: If the step does not exist or not all layers attend in it.
    """
    if not 0 <= step < 1:
        raise ValueError(f"step must be a share of the steps in [0, 1), got {step}")
    steps = arguments["num_inference_steps"]
    search = _Search(replace(method, table=None), measure, on_layer)
    started = time.perf_counter()
    with torch.no_grad():
        observe_step(pipe, int(step * steps), search.observe, arguments)
    return search.table(
        {
            **(provenance or {}),
            "step": int(step * steps),
            "search_seconds": round(time.perf_counter() - started, 3),
        }
    )


def all_patterns(strides: tuple[str, ...]) -> list[Pattern]:
    """Every pattern there is with these strides, at density 1."""
    grids = [Pattern(KINDS[GRID], stride, lines) for stride in strides for lines in LINES]
    return [Pattern(KINDS[A_SHAPE]), Pattern(KINDS[VERTICAL_SLASH]), *grids]


class _Search:
    def __init__(
        self, method: MMInference, measure: Measure, on_layer: Callable[[int, int], None] | None
    ) -> None:
        self.method = method
        self.measure = measure
        self.on_layer = on_layer
        self.candidates: list[Candidate] = []
        self.unit = 0.0
        self.choices: dict[int, list[HeadPatterns]] = {}
        self.facts: dict[str, Any] = {}

    def observe(self, call: Call) -> None:
        # The first branch stands for all: the patterns of a head are the model's, not the input's.
        if call.layer in self.choices:
            return
        ranges = modality_ranges(self.method.modalities, call.layout)
        if not self.candidates:
            model = call.model or ModelIdentity("")
            self.facts = {
                "model": replace(model, component=""),
                "layers": call.layers,
                "heads": call.q.shape[2],
                "dim": call.q.shape[3],
                "modalities": len(ranges),
            }
            self.sample = {
                "grid": list(call.layout.grid),
                "text": call.layout.text,
                "batch": call.q.shape[0],
                "dtype": str(call.q.dtype).removeprefix("torch."),
            }
            self.candidates = self.calibrate(call, BOUNDARIES if len(ranges) > 1 else ("none",))
        self.choices[call.layer] = self.choose(call)
        if self.on_layer is not None:
            self.on_layer(len(self.choices), call.layers)

    def calibrate(self, call: Call, boundaries: tuple[str, ...]) -> list[Candidate]:
        """All candidates at the density at which they take as long as the A-shape."""
        a_shape = Pattern(KINDS[A_SHAPE], density=max(1 - self.method.sparsity, 1e-3))
        usable = self.method.groups(call, "none")[1][0].usable
        strides = tuple(s for s, ok in zip(self.method.strides, usable, strict=True) if ok)
        reference = self._parts(call, "none", a_shape)

        def cost(boundary: str, pattern: Pattern) -> float:
            parts = self._parts(call, boundary, pattern)
            ratio, self.unit = self.measure(
                lambda: attend_parts(call, parts),
                lambda: attend_parts(call, reference),
                call.q.device,
            )
            return ratio

        found = []
        for boundary, pattern in product(boundaries, all_patterns(strides)):
            if boundary == "none" and pattern.kind == KINDS[A_SHAPE]:
                found.append(Candidate(boundary, a_shape, 1.0))
                continue

            def cost_at(
                density: float, boundary: str = boundary, pattern: Pattern = pattern
            ) -> float:
                return cost(boundary, replace(pattern, density=density))

            matched = match_cost(cost_at, a_shape.density)
            density, ratio = matched or (a_shape.density, None)
            found.append(Candidate(boundary, replace(pattern, density=density), ratio))
        return found

    def _parts(self, call: Call, boundary: str, pattern: Pattern) -> Parts:
        """All heads with one pattern for all pairs."""
        pairs = pair_count(boundary, self.facts["modalities"])
        return self.method.parts(call, boundary, None, [[pattern] * call.q.shape[2]] * pairs)

    def choose(self, call: Call) -> list[HeadPatterns]:
        """The best of the candidates for each head of this layer."""
        dense = call.dense()
        lse = call.row_lse() if self.facts["modalities"] > 1 else None
        best: list[tuple[float, str, tuple[int, ...]]] = []
        for boundary in BOUNDARIES:
            usable = [
                index
                for index, candidate in enumerate(self.candidates)
                if candidate.boundary == boundary and candidate.cost is not None
            ]
            if not usable:
                continue
            pairs, errors = self._best_pairs(call, boundary, usable, dense, lse)
            for head, (pair, error) in enumerate(zip(pairs, errors.tolist(), strict=True)):
                if len(best) <= head:
                    best.append((error, boundary, pair))
                elif error < best[head][0]:
                    best[head] = (error, boundary, pair)
        return [HeadPatterns(boundary, pair, round(e, 6)) for e, boundary, pair in best]

    def _best_pairs(
        self, call: Call, boundary: str, usable: list[int], dense: Tensor, lse: Tensor | None
    ) -> tuple[list[tuple[int, ...]], Tensor]:
        """For each head the best candidate for each pair of groups, and the error of them all."""
        heads = call.q.shape[2]
        winners, errors = [], []
        for pair in range(pair_count(boundary, self.facts["modalities"])):
            reference: Tensor | None = None
            tried = []
            for index in usable:
                pattern = self.candidates[index].pattern
                part = self._part(call, boundary, pair, pattern)
                # The output where a part holds all keys, else its share of the output.
                norm = lse if boundary == "2d" else None
                if reference is None:
                    reference = dense if norm is None else _contribution(call, _full(part), norm)
                got = _contribution(call, part, norm)
                if part.queries.size == call.layout.tokens:
                    tried.append(relative_error(got, reference))
                else:
                    rows = part.queries.tokens
                    tried.append(relative_error(got[:, rows], reference[:, rows]))
            error, winner = torch.stack(tried).min(0)
            winners.append([usable[i] for i in winner.tolist()])
            errors.append(error)
        pairs = list(zip(*winners, strict=True))
        if len(winners) == 1:
            return pairs, errors[0]
        patterns = [[self.candidates[row[h]].pattern for h in range(heads)] for row in winners]
        out = attend_parts(call, self.method.parts(call, boundary, None, patterns))
        return pairs, relative_error(out, dense)

    def _part(self, call: Call, boundary: str, pair: int, pattern: Pattern) -> Part:
        queries, keys = self.method.groups(call, boundary)
        q, k = divmod(pair, len(keys))
        return self.method.part(call, queries[q], keys[k], None, [pattern] * call.q.shape[2])

    def table(self, provenance: dict[str, Any]) -> PatternTable:
        """The choices of all layers, with the candidates in use."""
        missing = sorted(set(range(self.facts.get("layers", 0))) - set(self.choices))
        if missing:
            raise ValueError(
                f"layers {missing} made no self-attention call in the observed step; choose "
                "another step, or switch caches that skip layers off"
            )
        used = sorted({i for row in self.choices.values() for head in row for i in head.patterns})
        place = {index: n for n, index in enumerate(used)}
        rows = tuple(
            tuple(
                replace(head, patterns=tuple(place[i] for i in head.patterns))
                for head in self.choices[layer]
            )
            for layer in sorted(self.choices)
        )
        return PatternTable(
            **self.facts,
            settings=self.method.table_settings(),
            patterns=tuple(self.candidates[index].pattern for index in used),
            choices=rows,
            provenance={
                **provenance,
                "sample": self.sample,
                "layer_seconds": self.unit,
                "candidates": [asdict(candidate) for candidate in self.candidates],
            },
        )


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Root of summed squares of the difference over that of ``wanted``, ``[heads]`` fp32.

    Args:
        got: ``[batch, tokens, heads, dim]``.
        wanted: Same shape.
    """
    errors = []
    # One head after the other: fp32 copies of whole outputs would be gigabytes.
    for head in range(got.shape[2]):
        one, other = got[:, :, head].float(), wanted[:, :, head].float()
        errors.append((one - other).norm() / other.norm().clamp_min(1e-30))
    return torch.stack(errors)


def _full(part: Part) -> Part:
    """``part`` with every block kept."""
    sizes = part.queries.size, part.keys.size
    mask = BlockMask.full(part.mask.block, sizes, part.mask.device).pack()
    return replace(part, mask=mask)


def _contribution(call: Call, part: Part, lse: Tensor | None) -> Tensor:
    """Attention over the keys of ``part``; its share of a softmax of normaliser ``lse``, if given.

    Rows that are not among the part's queries are undefined.
    """
    attended: Attended = attend_side(call, [part])
    if lse is None:
        return attended.out
    weight = (attended.lse - lse).exp().transpose(1, 2).unsqueeze(-1)
    return attended.out.to(weight.dtype) * weight
