"""A plan: for every step, layer and head of one model, which attention pattern it computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_sparse.bands import FULL, SKIP, HeadPattern, half_width
from dit_sparse.methods.base import ModelIdentity

FORMAT = "dit-sparse plan"
VERSION = 1
MODE_NAMES = ("dense", "skip", "diagonal", "multi_diagonal", "vertical_stripe")
# A table row is one character a head.
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to compute a head, independent of the sequence length.

    Attributes:
        name: One of ``MODE_NAMES``.
        density: Share of the video-to-video blocks that a sparse pattern keeps, in (0, 1]; None for
            ``dense`` and ``skip``.
        shift: Where the columns of ``vertical_stripe`` start, as a share of their spacing; else 0.

    Raises:
        ValueError: If these do not go together.
    """

    name: str
    density: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in MODE_NAMES:
            raise ValueError(f"mode must be one of {list(MODE_NAMES)}, got {self.name!r}")
        is_sparse = self.name not in ("dense", "skip")
        density = self.density
        if is_sparse != (density is not None) or (density is not None and not 0 < density <= 1):
            raise ValueError(
                "a sparse pattern has a density in (0, 1], dense and skip have none; got "
                f"{density!r} for {self.name!r}"
            )
        if not 0 <= self.shift < 1 or (self.shift and self.name != "vertical_stripe"):
            raise ValueError(
                f"shift is a share in [0, 1) for vertical_stripe, got {self.shift!r} for "
                f"{self.name!r}"
            )

    def __str__(self) -> str:
        shift = f" shift {self.shift:g}" if self.shift else ""
        return self.name + (f" {self.density:g}{shift}" if self.density is not None else "")

    def pattern(self, blocks: int) -> HeadPattern:
        """What a head of this mode attends to among ``blocks`` video blocks."""
        if self.density is None:
            return FULL if self.name == "dense" else SKIP
        if self.name == "vertical_stripe":
            return HeadPattern(columns=max(1, round(self.density * blocks)), shift=self.shift)
        order = "frame_major" if self.name == "diagonal" else "position_major"
        return HeadPattern(half_width(self.density, blocks), order=order)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"mode": self.name}
        if self.density is not None:
            data["density"] = self.density
        if self.shift:
            data["shift"] = self.shift
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Mode:
        _check_keys(data, {"mode"}, {"density", "shift"}, "a mode")
        return cls(data["mode"], data.get("density"), data.get("shift", 0.0))


DENSE = Mode("dense")


@dataclass(frozen=True, slots=True)
class PlanStep:
    """The table of one denoising step.

    Attributes:
        progress: How far the noise has fallen, see :class:`~dit_sparse.schedule.Step`.
        component: The transformer that runs at this step, by its name in the pipeline.
        table: Mode of every head, ``[layers][heads]``, as indices into the plan's modes.
    """

    progress: float
    component: str
    table: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What :func:`~dit_sparse.pipelines.search.search` finds and Sparse-vDiT follows.

    Attributes:
        model: The model it was searched on; its component is empty.
        heads: Attention heads of every layer.
        dim: Channels of a head.
        grid: Video tokens (frames, height, width) it was searched at.
        block: Tokens in a block.
        modes: What the tables refer to; the first is dense.
        steps: In the order of the search, noisiest first.
        provenance: How it was made: plain data, not interpreted.

    Raises:
        ValueError: If a table has the wrong shape or refers to no mode.
    """

    model: ModelIdentity
    heads: int
    dim: int
    grid: tuple[int, int, int]
    block: int
    modes: tuple[Mode, ...]
    steps: tuple[PlanStep, ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.modes or self.modes[0] != DENSE or len(self.modes) > len(DIGITS):
            raise ValueError(
                f"a plan has 1 to {len(DIGITS)} modes of which the first is dense, got "
                f"{[str(mode) for mode in self.modes]}"
            )
        if not self.steps:
            raise ValueError("a plan has at least one step, got none")
        layers = len(self.steps[0].table)
        for number, step in enumerate(self.steps):
            if not 0 <= step.progress <= 1:
                raise ValueError(
                    f"progress must be in [0, 1], got {step.progress} in step {number}"
                )
            if len(step.table) != layers or any(len(row) != self.heads for row in step.table):
                raise ValueError(
                    f"every step needs {layers} layers of {self.heads} heads, step {number} has "
                    f"layers of {sorted({len(row) for row in step.table})} heads, "
                    f"{len(step.table)} of them"
                )
            if any(not 0 <= mode < len(self.modes) for row in step.table for mode in row):
                raise ValueError(
                    f"step {number} refers to modes outside of the plan's {len(self.modes)}"
                )

    @property
    def layers(self) -> int:
        """Self-attention layers."""
        return len(self.steps[0].table)

    def step_at(self, progress: float, component: str = "") -> PlanStep:
        """The step of nearest noise level, the noisier of two; of ``component`` where it is given.

        A component that the plan does not know is one of :meth:`mismatches`.
        """
        steps = [s for s in self.steps if not component or s.component in ("", component)]
        return min(steps, key=lambda step: (abs(step.progress - progress), step.progress))

    def mismatches(
        self,
        model: ModelIdentity | None,
        layers: int,
        heads: int,
        dim: int,
        grid: tuple[int, int, int] | None,
    ) -> list[str]:
        """Why the plan does not fit; empty if it does.

        Args:
            model: The model at hand; None where it is not known.
            layers: Its self-attention layers.
            heads: Its attention heads.
            dim: Channels of a head.
            grid: Its video tokens; None to accept any.
        """
        reasons = []
        if model is not None:
            reasons += self.model.differences(model)
            components = {step.component for step in self.steps} - {""}
            if model.component and components and model.component not in components:
                reasons.append(f"it has steps of {sorted(components)}, not of {model.component!r}")
            if not model.component and len(components) > 1:
                reasons.append(
                    f"it has steps of {sorted(components)}, and which one this is only "
                    "enable_sparse_attention(pipe, ...) tells"
                )
        for name, mine, theirs in (
            ("layers", self.layers, layers),
            ("heads", self.heads, heads),
            ("channels a head", self.dim, dim),
        ):
            if mine != theirs:
                reasons.append(f"it has {mine} {name}, the model {theirs}")
        if grid is not None and tuple(grid) != self.grid:
            reasons.append(
                f"it was searched at {self.grid} (frames, height, width) tokens, this is "
                f"{tuple(grid)}"
            )
        return reasons

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; :meth:`from_dict` restores it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "class": self.model.kind,
                "config": {key: json.loads(value) for key, value in self.model.config},
                "layers": self.layers,
                "heads": self.heads,
                "dim": self.dim,
            },
            "grid": list(self.grid),
            "block": self.block,
            "modes": [mode.to_dict() for mode in self.modes],
            "steps": [
                {
                    "progress": step.progress,
                    "component": step.component,
                    "layers": ["".join(DIGITS[mode] for mode in row) for row in step.table],
                }
                for step in self.steps
            ],
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Restores :meth:`to_dict`.

        Raises:
            ValueError: If it is not a plan, or of another version, or inconsistent.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f'expected a plan, an object with "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise ValueError(
                f"plan version must be {VERSION}, got {data.get('version')!r}; search it again "
                "with this release of dit-sparse"
            )
        keys = {"format", "version", "model", "grid", "block", "modes", "steps", "provenance"}
        _check_keys(data, keys, set(), "a plan")
        model = data["model"]
        _check_keys(model, {"class", "config", "layers", "heads", "dim"}, set(), "a plan's model")
        config = tuple(
            (key, json.dumps(value, sort_keys=True))
            for key, value in sorted(model["config"].items())
        )
        for step in data["steps"]:
            _check_keys(step, {"progress", "component", "layers"}, set(), "a plan's step")
        found = cls(
            ModelIdentity(model["class"], config),
            model["heads"],
            model["dim"],
            tuple(data["grid"]),
            data["block"],
            tuple(Mode.from_dict(mode) for mode in data["modes"]),
            tuple(
                PlanStep(
                    step["progress"],
                    step["component"],
                    tuple(tuple(DIGITS.index(digit) for digit in row) for row in step["layers"]),
                )
                for step in data["steps"]
            ),
            data["provenance"],
        )
        if found.layers != model["layers"]:
            raise ValueError(
                f"the plan says {model['layers']} layers, its tables have {found.layers}"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


def load_plan(path: str | Path) -> Plan:
    """Reads a plan that :meth:`Plan.save` wrote; an unchanged file is read once.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a plan.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a plan in {str(path)!r}, got no such file; make one with "
            f"`dit-sparse search --output {path}`"
        )
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _load(path: Path, modified: int) -> Plan:
    try:
        return Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    # A table with a character that is no digit, or a value of another type.
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"expected a plan in {str(path)!r}, got an unusable one: {error}"
        ) from error


def _check_keys(data: Any, needed: set[str], optional: set[str], what: str) -> None:
    if not isinstance(data, dict) or not needed <= set(data) <= needed | optional:
        got = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{what} has the keys {sorted(needed | optional)}, got {got}")
