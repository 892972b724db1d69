"""What `--methods` means: the arms of a comparison."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_sparse import SparseConfig

DENSE = "dense"
NOISE_FLOOR = "noise-floor"
# The method behind the noise-floor arm: all blocks kept, computed by this package's kernels.
NOISE_FLOOR_METHOD = "full"


@dataclass(frozen=True)
class Arm:
    """One way to generate the clip.

    Attributes:
        label: What the user wrote; names the arm in tables and files.
        config: What to enable.
    """

    label: str
    config: SparseConfig

    @property
    def is_dense(self) -> bool:
        """Whether this is the reference itself."""
        return self.label == DENSE

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return re.sub(r"[^A-Za-z0-9.=]+", "-", Path(self.label).name).strip("-")


def accepted() -> str:
    """One line that lists what an entry may be."""
    from dit_sparse.methods import list_methods

    names = sorted({DENSE, NOISE_FLOOR, *list_methods()})
    return f"{', '.join(names)}, NAME:option=value, or the path of a SparseConfig .json"


def split_entries(text: str) -> list[str]:
    """Splits at commas that are not inside brackets, so that tuples survive.

    Args:
        text: For example ``"dense,adaspa:search=(0.1,0.5)"``.
    """
    entries, depth = [""], 0
    for char in text:
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += char
    return [entry.strip() for entry in entries if entry.strip()]


def parse_arms(text: str) -> list[Arm]:
    """The arms of a `--methods` value; the dense reference is always first.

    Args:
        text: Comma-separated entries, each ``dense``, ``noise-floor``, a method name, a method
            with options (``adaspa:sparsity=0.8:block=128``) or the path of a SparseConfig json.

    Raises:
        ValueError: On an unknown method or option, a value out of range, or a repeated entry.
    """
    entries = split_entries(text)
    if not entries:
        raise ValueError(f"expected at least one method, got {text!r}; write one of {accepted()}")
    arms = [parse_arm(DENSE)] + [parse_arm(entry) for entry in entries if entry != DENSE]
    seen: set[str] = set()
    for arm in arms:
        if arm.slug in seen:
            raise ValueError(
                f"expected every method once, got {arm.label!r} twice (or two entries that share "
                f"the file name {arm.slug!r}); remove or rename one"
            )
        seen.add(arm.slug)
    return arms


def parse_arm(entry: str) -> Arm:
    """One arm, see `parse_arms`."""
    from dit_sparse import SparseConfig
    from dit_sparse.methods import list_methods

    entry = entry.strip()
    # An option of a method may be the path of a file, too.
    if entry.endswith(".json") and entry.partition(":")[0] not in list_methods():
        path = Path(entry)
        if not path.is_file():
            raise ValueError(
                f"expected the path of a SparseConfig json, got {entry!r}, which is not a file; "
                "write one with SparseConfig(...).save(path)"
            )
        try:
            config = SparseConfig.load(path)
        except (ValueError, TypeError, OSError, NotImplementedError) as error:
            raise ValueError(
                f"expected a SparseConfig json in {entry!r}, got an unusable one: {error}"
            ) from error
        return Arm(entry, config)
    name, _, rest = entry.partition(":")
    if name == NOISE_FLOOR:
        if rest:
            raise ValueError(f"expected {NOISE_FLOOR!r} without options, got {entry!r}")
        return Arm(entry, SparseConfig.from_name(NOISE_FLOOR_METHOD))
    options = _parse_options(entry, rest)
    _check_names(entry, name, options)
    try:
        return Arm(entry, SparseConfig.from_name(name, **options))
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise ValueError(f"{entry}: {error}") from error


def _parse_options(entry: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, text.split(":")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(
                f"expected option=value in {entry!r}, got {part!r}; write for example "
                "adaspa:sparsity=0.8:block=128"
            )
        if key in options:
            raise ValueError(f"expected option {key!r} once, got it twice in {entry!r}")
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_names(entry: str, name: str, options: dict[str, Any]) -> None:
    from dit_sparse import SparseConfig
    from dit_sparse.methods import list_methods

    known = list_methods()
    if name not in known:
        close = get_close_matches(name, [*known, NOISE_FLOOR], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"expected a method out of {accepted()}; got {entry!r}{hint}")
    names = [field.name for field in fields(known[name])]
    names += [field.name for field in fields(SparseConfig) if field.name != "method"]
    for option in options:
        if option not in names:
            close = get_close_matches(option, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"expected options of {name!r} out of {names}, got {option!r} in {entry!r}{hint}"
            )
