"""The report as one HTML page that needs no network and no other file."""

from __future__ import annotations

import base64
from itertools import groupby
from pathlib import Path
from typing import Any

PLOT_WIDTH, PLOT_HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 12, 34
# Distinct line colours that the style sheet defines for light and dark.
LINE_COLOURS = 6


def write_html(path: Path, report: dict[str, Any]) -> None:
    """Writes the page.

    Args:
        path: File to write; the videos named in the report are looked up next to it.
        report: The parsed content of report.json.
    """
    path.write_text(render_html(report, path.parent), encoding="utf-8")


def render_html(report: dict[str, Any], folder: Path) -> str:
    """The page as text.

    Args:
        report: The parsed content of report.json.
        folder: Where the paths in the report are relative to.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dit_sparse.eval", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "data_uri": lambda p: _data_uri(folder / p)}
    sections = []
    for prompt, group in groupby(report["runs"], key=lambda run: run["prompt"]):
        runs = list(group)
        sections.append({"prompt": prompt, "runs": runs, "plot": psnr_plot(runs)})
    return environment.get_template("report.html.j2").render(report=report, sections=sections)


def format_number(value: float | str | None, digits: int = 2, unit: str = "") -> str:
    """A number for a table: "–" for None, "∞" for infinity.

    Args:
        value: A number, "inf" or None.
        digits: Decimals.
        unit: Appended to finite numbers.
    """
    if value is None:
        return "–"
    if isinstance(value, str) or value == float("inf"):
        return "∞"
    return f"{value:.{digits}f}{unit}"


def _data_uri(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def psnr_plot(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometry of the PSNR plot, in pixels.

    Args:
        runs: Runs of one prompt. Identical frames (infinite PSNR) have no point.

    Returns:
        "lines" (label, colour index, points of each unbroken stretch), "rows" and "columns" (axis
        ticks), "hidden" (labels without a finite value) and the size.
    """
    measured = [run for run in runs if run["psnr_frames"]]
    finite = [v for run in measured for v in run["psnr_frames"] if not isinstance(v, str)]
    frames = max((len(run["psnr_frames"]) for run in measured), default=1)
    low, high, tick = _axis(finite)

    def x(frame: int) -> float:
        return round(LEFT + (PLOT_WIDTH - LEFT - RIGHT) * frame / max(frames - 1, 1), 1)

    def y(value: float) -> float:
        return round(TOP + (PLOT_HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    lines, hidden = [], []
    for index, run in enumerate(measured):
        stretches: list[list[tuple[float, float]]] = [[]]
        for frame, value in enumerate(run["psnr_frames"]):
            if isinstance(value, str):
                stretches.append([])
            else:
                stretches[-1].append((x(frame), y(value)))
        stretches = [stretch for stretch in stretches if stretch]
        lines.append(
            {"label": run["method"], "colour": index % LINE_COLOURS, "stretches": stretches}
        )
        if not stretches:
            hidden.append(run["method"])
    count = round((high - low) / tick)
    every = max(1, -(-frames // 12))
    return {
        "width": PLOT_WIDTH,
        "height": PLOT_HEIGHT,
        "left": LEFT,
        "right": PLOT_WIDTH - RIGHT,
        "bottom": PLOT_HEIGHT - BOTTOM,
        "lines": lines,
        "hidden": hidden,
        "rows": [(y(low + i * tick), f"{low + i * tick:g}") for i in range(count + 1)],
        "columns": [(x(frame), frame) for frame in range(0, frames, every)],
        "empty": not finite,
    }


def _axis(values: list[float]) -> tuple[float, float, float]:
    """Bounds and tick of an axis that holds ``values`` in at most seven intervals."""
    if not values:
        return 0.0, 50.0, 10.0
    for tick in (1, 2, 5, 10, 20, 50, 100):
        low = min(values) // tick * tick
        high = -(-max(values) // tick) * tick
        high = high if high > low else low + tick
        if (high - low) / tick <= 7:
            break
    return low, high, tick
