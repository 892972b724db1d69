"""Where a generation stands, and what a method does there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """What one attention call does.

    DENSE: the model's own attention, untouched. SEARCH: the same output, and a mask is found on
    the way. REFRESH: a mask is found first, from cached statistics, then attention is sparse.
    SPARSE: attention under the mask at hand.
    """

    DENSE = "dense"
    SEARCH = "search"
    REFRESH = "refresh"
    SPARSE = "sparse"


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step as one CFG branch of one model sees it.

    Attributes:
        index: Denoising step, 0-based. Counts distinct timesteps, not calls.
        total: Steps of this generation, or None where nothing tells.
        progress: How far the noise level has fallen, 0 at the first timestep to 1 at zero noise.
        branch: CFG branch, e.g. ``"cond"``; a second call at one timestep gets a suffix.
        generation: Number of the generation since the model was bound.
    """

    index: int
    total: int | None
    progress: float
    branch: str
    generation: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Dense warm-up, then sparse attention with a mask that is searched at a few steps.

    Attributes:
        search: When masks are searched: step counts (int) or shares of all steps (float in
            [0, 1]), ascending. The first one ends the warm-up: with ``10`` the steps 0 to 9 are
            dense and the mask is found in step 9. A later one, ``30``, refreshes the mask in step
            29 before that step's attention. ``0`` means no warm-up: the first step, dense,
            searches.

    Raises:
        ValueError: If ``search`` is empty, not ascending, negative, or a share exceeds 1.

    Source: AdaSpa (arXiv 2502.21079), section 4.3, its T_s; shares scale the paper's 10 and 30 of
    50 steps to other step counts.
    """

    search: tuple[int | float, ...] = (0.2, 0.6)

    def __post_init__(self) -> None:
        if not self.search:
            raise ValueError("search must name at least one step or share of the steps, got ()")
        for point in self.search:
            if isinstance(point, bool) or not isinstance(point, int | float):
                raise ValueError(f"a search step must be an int or a float, got {point!r}")
            # Written so that NaN is refused too.
            if not point >= 0 or (isinstance(point, float) and point > 1):
                raise ValueError(
                    f"a search step must be an int >= 0 or a share in [0, 1], got {point}"
                )
        if len({type(point) for point in self.search}) > 1:
            raise ValueError(f"search must hold either ints or shares, got {self.search}")
        if list(self.search) != sorted(set(self.search)):
            raise ValueError(f"search must ascend without repeats, got {self.search}")

    def steps(self, total: int) -> tuple[int, ...]:
        """The 0-based steps in which a mask is searched in a run of ``total`` steps."""
        counts = [round(p * total) if isinstance(p, float) else p for p in self.search]
        # In very short runs several shares meet in one step.
        return tuple(sorted({max(count - 1, 0) for count in counts}))

    def phase(self, step: Step, found: int | None) -> Phase:
        """What to do at ``step``.

        A step cache may skip the call that would have searched, and image-to-video runs may start
        in the middle: a search or refresh that was missed is made up for at the next call.

        Args:
            step: Where the generation stands.
            found: Index of the step in which this layer and branch last found a mask in this
                generation, or None.
        """
        if step.total is None and isinstance(self.search[0], float):
            return self._phase_by_noise(step, found is not None)
        searches = self.steps(step.total or 0)
        if step.index < searches[0]:
            return Phase.DENSE
        if found is None:
            return Phase.SEARCH
        due = max(search for search in searches if search <= step.index)
        return Phase.REFRESH if found < due else Phase.SPARSE

    def _phase_by_noise(self, step: Step, has_mask: bool) -> Phase:
        # Nobody told the number of steps, so shares are read on the noise scale instead. Only the
        # first search can be placed this way: a refresh would need to know the step it falls into.
        if step.progress < self.search[0]:
            return Phase.DENSE
        return Phase.SPARSE if has_mask else Phase.SEARCH


@dataclass(frozen=True, slots=True)
class Cadence:
    """Dense warm-up, then sparse attention under a mask that is found anew every few steps.

    For masks that cost little to find: no dense step is spent on the search, which comes before the
    attention of the step that first uses it.

    Attributes:
        warmup: Dense steps at the start: a count (int) or a share of all steps (float in [0, 1]).
        every: Steps that a mask serves; None keeps the first one.

    Raises:
        ValueError: If a value is outside these ranges.
    """

    warmup: int | float = 0.2
    every: int | None = 1

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int | float):
            raise ValueError(f"warmup must be an int or a float, got {self.warmup!r}")
        if not self.warmup >= 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ValueError(
                f"warmup must be an int >= 0 or a share in [0, 1], got {self.warmup!r}"
            )
        if self.every is not None and (
            isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1
        ):
            raise ValueError(f"every must be a number of steps, 1 or more, got {self.every!r}")

    def phase(self, step: Step, found: int | None) -> Phase:
        """What to do at ``step``.

        Args:
            step: Where the generation stands.
            found: Index of the step in which this layer and branch last found a mask in this
                generation, or None.
        """
        if self._is_warmup(step):
            return Phase.DENSE
        if found is None or (self.every is not None and step.index - found >= self.every):
            return Phase.REFRESH
        return Phase.SPARSE

    def _is_warmup(self, step: Step) -> bool:
        if isinstance(self.warmup, int):
            return step.index < self.warmup
        if step.total is None:
            # Nobody told the number of steps, so the share is read on the noise scale instead.
            return step.progress < self.warmup
        return step.index < round(self.warmup * step.total)


def phases(schedule: Schedule, total: int) -> Sequence[Phase]:
    """The phases of a whole run of ``total`` steps in which no call is skipped."""
    result: list[Phase] = []
    found = None
    for index in range(total):
        step = Step(index, total, index / total, "cond", 0)
        result.append(schedule.phase(step, found))
        found = index if result[-1] in (Phase.SEARCH, Phase.REFRESH) else found
    return result


@dataclass(frozen=True, slots=True)
class PeriodicSchedule:
    """Dense warm-up, then one dense step in every ``period`` from which the others take statistics.

    Such a step is a SEARCH: its output is the model's own. A run of 50 steps with a warm-up of 15
    and a period of 5 is dense in steps 0 to 14 and in 15, 20, ..., 45, sparse in the others.

    Attributes:
        warmup: Dense steps before the first SEARCH: a count (int) or a share of all steps (float in
            [0, 1]).
        period: Steps from one SEARCH to the next, 1 or more.

    Raises:
        ValueError: On a value outside these ranges.

    Source: Re-ttention (arXiv 2505.22918), which warms up for 15 (CogVideoX) or 10 (Hunyuan-DiT) of
    50 steps or 5 of 20 (PixArt) and then takes every fifth.
    """

    warmup: int | float = 0.3
    period: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int | float):
            raise ValueError(f"warmup must be an int or a float, got {self.warmup!r}")
        if not self.warmup >= 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ValueError(
                f"warmup must be a number of steps (int >= 0) or a share of them (float in "
                f"[0, 1]), got {self.warmup}"
            )
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise ValueError(f"period must be a number of steps, an int >= 1, got {self.period!r}")

    def phase(self, step: Step, kept: int | None) -> Phase:
        """What to do at ``step``.

        Args:
            step: Where the generation stands.
            kept: The step whose statistics this layer and branch hold, or None. A SEARCH that was
                due in a step that a cache skipped is made up for at the next call.
        """
        if isinstance(self.warmup, int):
            is_warm = step.index >= self.warmup
        elif step.total is None:
            # Nobody told the number of steps, so the share is read on the noise scale instead.
            is_warm = step.progress >= self.warmup
        else:
            is_warm = step.index >= round(self.warmup * step.total)
        if not is_warm:
            return Phase.DENSE
        if kept is not None and step.index - kept < self.period:
            return Phase.SPARSE
        # Statistics of the last step would serve nobody.
        is_last = step.total is not None and step.index >= step.total - 1
        return Phase.DENSE if is_last else Phase.SEARCH
