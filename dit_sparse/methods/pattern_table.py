"""What every head of a model computes, found offline and kept as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_sparse.methods.base import Call, ModelIdentity
from dit_sparse.methods.modality_parts import BOUNDARIES
from dit_sparse.methods.strides import check_stride

KINDS = ("grid", "vertical-slash", "a-shape")
GRID, VERTICAL_SLASH, A_SHAPE = range(3)
# Horizontal, vertical and slash lines in the combinations of the paper's table 4.
LINES = ("h", "v", "s", "hv", "vs", "hvs")

FORMAT = "dit-sparse/mminference"
VERSION = 1


@dataclass(frozen=True)
class Pattern:
    """One pattern with its parameters.

    Attributes:
        kind: One of ``KINDS``.
        stride: Of a grid: see :func:`~dit_sparse.methods.strides.residues`; named by axes, so that
            it means the same at another resolution. Empty otherwise.
        lines: Of a grid: one of ``LINES``. Empty otherwise.
        density: Share of the blocks between video tokens that it keeps.
    """

    kind: str
    stride: str = ""
    lines: str = ""
    density: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a pattern's kind must be one of {KINDS}, got {self.kind!r}")
        if self.kind == KINDS[GRID]:
            check_stride(self.stride)
            if self.lines not in LINES:
                raise ValueError(f"lines of a grid must be one of {LINES}, got {self.lines!r}")
        elif self.stride or self.lines:
            raise ValueError(
                f"only a grid has a stride and lines, got {self.stride!r} and {self.lines!r} for "
                f"{self.kind!r}"
            )
        if not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density!r}")


@dataclass(frozen=True)
class HeadPatterns:
    """What one head computes.

    Attributes:
        boundary: One of ``BOUNDARIES``.
        patterns: Of each pair of groups, as indices into the table's patterns: query groups in
            order and, within each, key groups.
        error: Relative error of the head's output on the calibration sample.
    """

    boundary: str
    patterns: tuple[int, ...]
    error: float


def pair_count(boundary: str, modalities: int) -> int:
    """Pairs of query and key groups that have a pattern each."""
    return {"none": 1, "q": modalities, "2d": modalities**2}[boundary]


@dataclass(frozen=True)
class PatternTable:
    """The patterns of all heads of all layers of one model.

    Attributes:
        model: The model it was searched on.
        layers: Its self-attention layers.
        heads: Heads of each.
        dim: Channels of a head.
        modalities: Modalities of the video tokens.
        settings: The settings of :class:`MMInference` that the patterns were found under.
        patterns: All patterns in use.
        choices: ``choices[layer][head]``.
        provenance: Where it comes from: sample, machine, versions. Never read.
    """

    model: ModelIdentity
    layers: int
    heads: int
    dim: int
    modalities: int
    settings: dict[str, Any]
    patterns: tuple[Pattern, ...]
    choices: tuple[tuple[HeadPatterns, ...], ...]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if [len(row) for row in self.choices] != [self.heads] * self.layers:
            raise ValueError(
                f"expected choices for {self.layers} layers of {self.heads} heads, got rows of "
                f"{[len(row) for row in self.choices]}"
            )
        for choice in (choice for row in self.choices for choice in row):
            if choice.boundary not in BOUNDARIES:
                raise ValueError(f"boundary must be one of {BOUNDARIES}, got {choice.boundary!r}")
            pairs = pair_count(choice.boundary, self.modalities)
            if len(choice.patterns) != pairs:
                raise ValueError(
                    f"expected {pairs} patterns for boundary {choice.boundary!r} of "
                    f"{self.modalities} modalities, got {choice.patterns}"
                )
            if not all(type(i) is int and 0 <= i < len(self.patterns) for i in choice.patterns):
                raise ValueError(
                    f"expected indices of {len(self.patterns)} patterns, got {choice.patterns}"
                )

    def check(self, call: Call, modalities: int) -> None:
        """Refuses a model that this table is not for.

        Args:
            call: One of its attention calls.
            modalities: Modalities of its video tokens.

        Raises:
            ValueError: If its class, configuration or any number differs; names all that do.
        """
        reasons = [] if call.model is None else self.model.differences(call.model)
        for name, mine, theirs in (
            ("layers", self.layers, call.layers),
            ("heads", self.heads, call.heads.total),
            ("channels a head", self.dim, call.q.shape[3]),
            ("modalities", self.modalities, modalities),
        ):
            if mine != theirs:
                reasons.append(f"it has {mine} {name}, the model {theirs}")
        if reasons:
            raise ValueError(
                f"this pattern table does not fit: {'; '.join(reasons)}. Search one with "
                "`dit-sparse search-mminference`"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; :meth:`from_dict` restores an equal object."""
        data = {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self)))}
        data["model"] = {"class": self.model.kind, "config": dict(self.model.config)}
        return data

    @classmethod
    def from_dict(cls, data: Any) -> PatternTable:
        """Restores :meth:`to_dict`.

        Raises:
            ValueError: On another format or version, missing or unknown keys, or wrong values.
        """
        found = (data.get("format"), data.get("version")) if isinstance(data, dict) else data
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"expected a pattern table of format {FORMAT!r}, version {VERSION}, got {found!r}; "
                "make one with `dit-sparse search-mminference`"
            )
        data = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            model = data["model"]
            config = tuple(sorted(model["config"].items()))
            data["model"] = ModelIdentity(model["class"], config)
            data["patterns"] = tuple(Pattern(**pattern) for pattern in data["patterns"])
            data["choices"] = tuple(
                tuple(HeadPatterns(**{**head, "patterns": tuple(head["patterns"])}) for head in row)
                for row in data["choices"]
            )
            return cls(**data)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"expected a whole pattern table, got one with {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PatternTable:
        """Reads a table that :meth:`save` wrote.

        Raises:
            ValueError: If there is no such file, it is not JSON, or as :meth:`from_dict`.
        """
        try:
            return _load(str(path), Path(path).stat().st_mtime_ns)
        except OSError as error:
            raise ValueError(
                f"expected the path of a pattern table, got {str(path)!r}: {error}; make one with "
                "`dit-sparse search-mminference`"
            ) from error


# A method asks for its table at every call.
@lru_cache(maxsize=16)
def _load(path: str, modified: int) -> PatternTable:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return PatternTable.from_dict(data)
