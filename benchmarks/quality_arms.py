"""What an evidence run generates: arms, the files that list them, and how they may be batched.

An arm is a method as `dit-sparse compare` takes it (``adaspa:sparsity=0.8``), ``noise-floor``, a
step cache of diffusers (``fbcache:threshold=0.1``, ``taylorseer:interval=4``,
``magcache:threshold=0.1``) or a cache and a method joined by ``+``. A method may end with the
density at which to compare it:

* ``adaspa@0.1``: turned until its sparse steps compute a tenth of the pairs
  (:func:`dit_sparse.eval.protocol.sparse_step_density`);
* ``adaspa@=compensated_delta``: turned until the whole generation computes as much as that of an
  earlier arm.

A file has one arm a line in order of priority, and after it what holds for it alone:
``captions=6`` (fewer than the others) and ``show`` (its worst clip is kept to look at). ``#``
begins a comment; ``{grid}`` is the grid of tokens, e.g. ``8x32x32``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dit_sparse.eval.arms import NOISE_FLOOR, Arm, parse_arm, split_entries

CACHES = {"fbcache": "threshold", "taylorseer": "interval", "magcache": "threshold"}
# These decide once for all clips of a batch: alone they decide as they would for a user's one clip.
BATCH_WIDE_CACHES = ("fbcache",)
BATCH_WIDE_METHODS = ("hyperattention", "moa")


@dataclass(frozen=True)
class QualityArm:
    """One way to generate: a step cache, a sparse method, or both.

    Attributes:
        label: As written, with the grid filled in.
        method: What to enable, or None.
        cache: Name and value of a step cache, or None.
        target: Density of the sparse steps to reach, or the label of the arm whose density over the
            whole generation is to be reached, or None.
        captions: Most captions to generate, None for all.
        show: Whether to keep the worst clip.
        missing: Why it cannot run here, e.g. a plan that nobody has made; None if it can.
    """

    label: str
    method: Arm | None = None
    cache: tuple[str, float] | None = None
    target: float | str | None = None
    captions: int | None = None
    show: bool = False
    missing: str | None = None

    @property
    def is_single(self) -> bool:
        """Whether clips have to be generated one by one."""
        if self.cache is not None and self.cache[0] in BATCH_WIDE_CACHES:
            return True
        if self.method is None:
            return False
        method = self.method.config.method
        return method.name in BATCH_WIDE_METHODS or bool(getattr(method, "fade", False))


def parse_line(line: str, grid: tuple[int, int, int]) -> QualityArm:
    """Reads an arm and what follows it, see the module's docstring.

    Raises:
        ValueError: On anything that is neither an arm nor one of its options.
    """
    label, *options = line.replace("{grid}", "x".join(map(str, grid))).split()
    captions, show = None, False
    for option in options:
        if option == "show":
            show = True
        elif option.startswith("captions=") and option[9:].isdecimal() and int(option[9:]):
            captions = int(option[9:])
        else:
            raise ValueError(f"expected 'show' or captions=NUMBER after an arm, got {line!r}")
    text, same, other = label.partition("@=")
    target: float | str | None = other if same else None
    if not same:
        text, at, number = label.partition("@")
        target = _share(number, label) if at else None
    method, cache, missing = None, None, None
    for piece in text.split("+"):
        name, _, value = piece.partition(":")
        if name in CACHES:
            key, _, number = value.partition("=")
            if key != CACHES[name] or cache is not None:
                raise ValueError(f"expected one {name}:{CACHES[name]}=NUMBER, got {label!r}")
            cache = (name, float(number))
        elif method is not None or missing is not None or name == "dense":
            raise ValueError(f"expected at most one method and one cache, got {label!r}")
        else:
            missing = _missing_file(value)
            method = parse_arm(piece) if missing is None else None
    if target is not None and missing is None:
        if method is None or method.label == NOISE_FLOOR or cache is not None:
            raise ValueError(f"expected a method alone before '@', got {label!r}")
        method.config.method.at_budget(0.5)
    return QualityArm(label, method, cache, target, captions, show, missing)


def _share(text: str, label: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"expected a density between 0 and 1 after '@', got {label!r}")
    return share


def _missing_file(options: str) -> str | None:
    """Says which file named in an arm's options is not there, if any."""
    from dit_sparse.methods.sparse_vdit import shipped_plans

    for option in options.split(":"):
        key, _, value = option.partition("=")
        if key == "plan" and value not in (*shipped_plans(), "auto") and not Path(value).is_file():
            return f"no plan {value}; make one with dit-sparse search"
        if key == "table" and not Path(value).is_file():
            return f"no table {value}; make one with dit-sparse search-mminference"
    return None


def read_arms(text: str, grid: tuple[int, int, int]) -> list[QualityArm]:
    """All arms of ``--arms``, each once, in order of priority.

    Args:
        text: Arms and files that list them (``*.txt``), separated by commas.
        grid: Latent (frames, height, width).

    Raises:
        ValueError: On an arm that cannot be read; names the file.
    """
    arms: dict[str, QualityArm] = {}
    for entry in split_entries(text):
        lines: Iterable[str] = (entry,)
        if entry.endswith(".txt"):
            lines = Path(entry).read_text(encoding="utf-8").splitlines()
        for line in lines:
            line = line.partition("#")[0].strip()
            if not line:
                continue
            try:
                arm = parse_line(line, grid)
            except ValueError as error:
                raise ValueError(f"{entry}: {error}") from error
            arms.setdefault(arm.label, arm)
    if not arms:
        raise ValueError(f"expected at least one arm, got {text!r}")
    return list(arms.values())
