"""Evidence files read back: rows with their intervals, claims, and who is beaten by nobody."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.quality_evidence import SCHEMA
from dit_sparse.eval.paired import Interval, bootstrap_mean, paired_difference

NOISE_FLOOR = "noise-floor"
# What turns the budget of an arm and not the arm into another one.
_BUDGET = re.compile(r"(?<=:)(density|sparsity|threshold|interval)=[0-9.]+")


@dataclass(frozen=True)
class Row:
    """One arm of a result.

    Attributes:
        data: As in the file.
    """

    data: dict[str, Any]

    @property
    def arm(self) -> str:
        """The label."""
        return self.data["arm"]

    @cached_property
    def psnr(self) -> Interval:
        """Mean over clips of the mean PSNR of frames."""
        return bootstrap_mean(self.data["psnr"])

    @cached_property
    def ssim(self) -> Interval:
        """Mean SSIM."""
        return bootstrap_mean(self.data["ssim"])

    @property
    def worst(self) -> float:
        """PSNR of the worst clip."""
        return min(self.data["psnr"])

    @property
    def density(self) -> float | None:
        """Of the whole generation; None where nothing counts it (step caches)."""
        return None if "+" in self.arm else self.data.get("density")

    @property
    def sparse_density(self) -> float | None:
        """Of the sparse steps."""
        return None if "+" in self.arm else self.data.get("sparse_density")

    @property
    def seconds(self) -> float | None:
        """Median time of a caption alone."""
        return statistics.median(self.data["seconds"]) if self.data.get("seconds") else None

    @property
    def batch_seconds(self) -> float | None:
        """Time of a clip in a batch: of the fastest batch, since the first one may compile."""
        return min(self.data["batch_seconds"]) if self.data.get("batch_seconds") else None

    @property
    def speedup(self) -> float | None:
        """Over dense in the same session."""
        dense = self.data.get("dense_seconds")
        return statistics.median(dense) / self.seconds if dense and self.seconds else None

    @property
    def batch_speedup(self) -> float | None:
        """The same in a batch."""
        dense = self.data.get("dense_batch_seconds")
        return min(dense) / self.batch_seconds if dense and self.batch_seconds else None

    @property
    def series(self) -> str:
        """The arm without its budget: arms of one series are points of one curve."""
        if "@=" in self.arm:
            return self.arm
        name = _BUDGET.sub("", self.arm.partition("@")[0])
        return re.sub(r":+(?=:|\+|$)", "", name)

    @property
    def family(self) -> str:
        """Method or step cache, or both."""
        return "+".join(piece.partition(":")[0].partition("@")[0] for piece in self.arm.split("+"))


@dataclass(frozen=True)
class Verdict:
    """Whether one arm did better than another.

    Attributes:
        text: The claim.
        better: Label of the arm that should be better.
        worse: Label of the other.
        difference: Of PSNR, dB, clip by clip; None if not both were measured.
        clips: How many.
    """

    text: str
    better: str
    worse: str
    difference: Interval | None
    clips: int

    @property
    def answer(self) -> str:
        """``"yes"``, ``"no"`` (the opposite holds), ``"not separated"`` or ``"not measured"``."""
        if self.difference is None:
            return "not measured"
        if self.difference.low > 0:
            return "yes"
        return "no" if self.difference.high < 0 else "not separated"


@dataclass(frozen=True)
class Result:
    """One evidence file.

    Attributes:
        data: Its content.
    """

    data: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads a file that `benchmarks.quality` wrote.

        Raises:
            ValueError: If it is of another version.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"expected a result of schema {SCHEMA} in {path}, got {data.get('schema')}; "
                "measure again with python -m benchmarks.quality"
            )
        return cls(data)

    @property
    def settings(self) -> dict[str, Any]:
        """What was generated."""
        return self.data["settings"]

    @property
    def title(self) -> str:
        """Size, steps and whether blocks are compiled."""
        s = self.settings
        size = f"{s['frames']}x{s['height']}x{s['width']}"
        how = ", compiled" if s["compiled"] else ""
        return f"{s['tokens']:,} tokens ({size}), {s['steps']} steps{how}"

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Arms with quality, by label, in the order of the file."""
        return {row["arm"]: Row(row) for row in self.data["rows"] if row.get("psnr")}

    @property
    def dense(self) -> dict[str, Any]:
        """The dense row."""
        return next(row for row in self.data["rows"] if row["arm"] == "dense")

    @property
    def targets(self) -> list[float]:
        """Densities that arms were brought to, ascending."""
        found = {row.data.get("target") for row in self.rows.values() if "@=" not in row.arm}
        return sorted(target for target in found if target is not None)

    def difference(self, arm: str, other: str) -> tuple[Interval, int] | None:
        """PSNR of ``arm`` minus that of ``other`` over the clips that both have, and their number.

        None if one is missing.
        """
        if arm not in self.rows or other not in self.rows:
            return None
        a, b = (self.rows[label].data["psnr"] for label in (arm, other))
        count = min(len(a), len(b))
        return paired_difference(a[:count], b[:count]), count

    def verdicts(self, claims: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """The claims whose arms this result knows, or was asked for."""
        found = []
        asked = {*self.rows, *(skip["arm"] for skip in self.data["skipped"])}
        asked |= {row["arm"] for row in self.data["rows"]}
        grid = "x".join(map(str, self.settings["grid"]))
        for better, worse, text in claims:
            densities: list[Any] = self.targets if "{d}" in better + worse else [None]
            for density in densities:
                winner, loser = (
                    label.replace("{d}", f"{density}").replace("{grid}", grid)
                    for label in (better, worse)
                )
                if not {winner, loser} <= asked:
                    continue
                gap = self.difference(winner, loser)
                words = text if density is None else f"{text} of {density:g}"
                difference, clips = gap if gap is not None else (None, 0)
                found.append(Verdict(words, winner, loser, difference, clips))
        return found

    def front(self, time: str) -> list[Row]:
        """The arms that no other arm beats in both PSNR and time, the fastest first.

        Args:
            time: ``"seconds"`` or ``"batch_seconds"``.
        """
        timed = [r for r in self.rows.values() if getattr(r, time) and r.arm not in _YARDSTICKS]
        front: list[Row] = []
        for row in sorted(timed, key=lambda row: (getattr(row, time), -row.psnr.mean)):
            if not front or row.psnr.mean > front[-1].psnr.mean:
                front.append(row)
        return front


_YARDSTICKS = (NOISE_FLOOR, "dense, one by one")


def read_claims(path: Path) -> list[tuple[str, str, str]]:
    """Claims as (better, worse, in words), see ``benchmarks/arms/claims.txt``.

    Raises:
        ValueError: On a line that is none.
    """
    claims = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        arms, bar, text = line.partition(" | ")
        better, above, worse = arms.partition(" > ")
        if not bar or not above:
            raise ValueError(f"expected 'BETTER > WORSE | in words' in {path}, got {line!r}")
        claims.append((better.strip(), worse.strip(), text.strip()))
    return claims
