"""Measures what every pattern of every head costs and loses, inside a model's own generation."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.bands import BandMask, HeadPattern, video_blocks
from dit_sparse.methods.base import Call
from dit_sparse.methods.plan import Mode
from dit_sparse.methods.sparse_vdit import is_warmup
from dit_sparse.pipelines.latency import relative_cost
from dit_sparse.pipelines.search_state import SearchState
from dit_sparse.pipelines.selection import choose
from dit_sparse.schedule import Phase


def head_losses(out: Tensor, reference: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared error of every head over the mean squared output of the layer's heads.

    ``sum |O_h - O'_h|^2 / (1/H sum_h' |O_h'|^2)``: a head that contributes little has little to
    lose, so a zero output (skip) costs it little, which an error relative to its own output would
    hide. The mean over heads is the relative error of the layer's output.

    Args:
        out: ``[batch, tokens, heads, dim]``.
        reference: The dense output, same shape.
        valid: Tokens that are not padding, ``[batch, tokens]`` bool.

    Returns:
        ``[heads]`` fp32.
    """
    error, energy = (out.float() - reference.float()).square(), reference.float().square()
    if valid is not None:
        error, energy = (x.masked_fill(~valid[..., None, None], 0.0) for x in (error, energy))
    tiny = torch.finfo(torch.float32).tiny
    return error.sum((0, 1, 3)) / energy.sum((0, 1, 3)).mean().clamp_min(tiny)


def nominal_costs(call: Call, modes: tuple[Mode, ...], block: int) -> list[float]:
    """Share of all pairs of tokens that each mode computes in ``call``, text included."""
    bands = BandMask(_patterns(call, modes, block), block, call.layout)
    return bands.head_density()[0].tolist()


def measured_costs(call: Call, modes: tuple[Mode, ...], block: int) -> list[float]:
    """Latency of ``call`` with all heads in each mode, over that of the model's own attention."""
    costs = [1.0]
    for pattern in _patterns(call, modes[1:], block):
        bands = BandMask((pattern,) * call.q.shape[2], block, call.layout)
        ratio, _ = relative_cost(
            lambda bands=bands: call.banded_attention(bands),  # type: ignore[misc]
            call.dense, call.q.device, turns=(3, 50), seconds=0.3,
        )  # fmt: skip
        costs.append(ratio)
    return costs


def _patterns(call: Call, modes: tuple[Mode, ...], block: int) -> tuple[HeadPattern, ...]:
    blocks = video_blocks(call.layout, block)
    return tuple(mode.pattern(blocks) for mode in modes)


COSTS = {"nominal": nominal_costs, "measured": measured_costs}


class Calibrator:
    """Computes the attention calls of a search, in place of a method.

    Args:
        modes: Candidates, dense first.
        block: Tokens in a block.
        cost: Key of ``COSTS``.
        warmup: Dense steps at the beginning: a count (int) or a share (float).
        state: What is known already; grows.
    """

    def __init__(
        self,
        modes: tuple[Mode, ...],
        block: int,
        cost: str,
        warmup: int | float,
        state: SearchState,
    ) -> None:
        self.modes, self.block, self.cost, self.warmup = modes, block, cost, warmup
        self.state = state
        self.generation = ""
        self.rule: tuple[float, float | None] | None = None
        # Sum and count of losses by (component, step), over the generations of this phase so far.
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], Tensor] = {}

    def begin_phase(self, rule: tuple[float, float | None] | None) -> None:
        """Starts a pass over all captions; with a ``rule`` (price, epsilon) choices propagate."""
        self.rule = rule
        self.sums, self.counts = {}, {}

    def add_finished(self, generation: str) -> None:
        """Takes the losses of a generation that an earlier run finished."""
        for name, losses in self.state.losses.items():
            if name.startswith(generation + "/"):
                _, component, _, step = name.rsplit("/", 3)
                for layer in range(losses.shape[0]):
                    self._add((component, int(step)), layer, losses)

    def _add(self, place: tuple[str, int], layer: int, losses: Tensor) -> None:
        if place not in self.sums:
            self.sums[place] = torch.zeros(losses.shape, dtype=torch.float64)
            self.counts[place] = torch.zeros(losses.shape[0], 1, 1)
        self.sums[place][layer] += losses[layer].double()
        self.counts[place][layer] += 1

    def attend(self, call: Call) -> Tensor:
        """Measures what is not known yet and computes the output that feeds the next layer."""
        component = call.model.component if call.model else ""
        name = f"{self.generation}/{component}/{call.step.branch}/{call.step.index}"
        self._note_shape(call, f"{component}/{call.step.index}")
        call.record(Phase.DENSE)
        reference = None
        if self.state.get(name, call.layer) is None:
            reference = call.dense()
            losses = self._measure(call, reference)
            self.state.put(name, call.layer, call.layers, losses.cpu())
        place = (component, call.step.index)
        self._add(place, call.layer, self.state.losses[name])
        if self.rule is not None:
            mean = self.sums[place][call.layer] / self.counts[place][call.layer]
            choice = choose(mean, self.costs, *self.rule).tolist()
            if any(choice):
                modes = tuple(self.modes[mode] for mode in choice)
                heads = _patterns(call, modes, self.block)
                return call.banded_attention(BandMask(heads, self.block, call.layout)).out
        return call.dense() if reference is None else reference

    @property
    def costs(self) -> Tensor:
        """Cost of every mode, ``[modes]``."""
        return torch.tensor(self.state.facts["costs"][self.cost], dtype=torch.float64)

    def _note_shape(self, call: Call, step: str) -> None:
        facts = self.state.facts
        shape = {
            "grid": list(call.layout.grid),
            "layers": call.layers,
            "heads": call.q.shape[2],
            "dim": call.q.shape[3],
        }
        if facts.setdefault("shape", shape) != shape:
            raise ValueError(
                f"expected one attention shape in all generations, got {facts['shape']} and {shape}"
            )
        facts["progress"].setdefault(step, call.step.progress)
        if self.cost not in facts.setdefault("costs", {}):
            facts["costs"][self.cost] = COSTS[self.cost](call, self.modes, self.block)

    def _measure(self, call: Call, reference: Tensor) -> Tensor:
        """Losses of all modes, ``[heads, modes]``; infinite where a step is to stay dense."""
        heads = call.q.shape[2]
        losses = torch.full((heads, len(self.modes)), float("inf"), device=call.q.device)
        losses[:, 0] = 0
        if is_warmup(self.warmup, call.step):
            return losses
        for index, pattern in enumerate(_patterns(call, self.modes, self.block)):
            if index == 0:
                continue
            if pattern.skip:
                out = torch.zeros_like(reference)
            else:
                bands = BandMask((pattern,) * heads, self.block, call.layout)
                out = call.banded_attention(bands).out
            losses[:, index] = head_losses(out, reference, call.key_valid)
        if not bool(losses.isfinite().all()):
            raise ValueError(
                f"the attention of layer {call.layer} is not finite at step {call.step.index}; "
                "the model itself overflows in this dtype"
            )
        return losses

    def table(self) -> tuple[list[tuple[str, int]], Tensor]:
        """Steps (component, index) in the order of the search, and their mean losses.

        Returns:
            The steps and ``[steps, layers, heads, modes]`` fp64.
        """
        steps = sorted(self.sums, key=lambda place: (self.progress(place), place))
        means = [self.sums[place] / self.counts[place].clamp_min(1) for place in steps]
        return steps, torch.stack(means)

    def progress(self, place: tuple[str, int]) -> float:
        """The progress of a step, see :class:`~dit_sparse.schedule.Step`."""
        return self.state.facts["progress"][f"{place[0]}/{place[1]}"]
