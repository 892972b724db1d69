"""PSNR or SSIM against measured time, one picture of all evidence files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality_results import NOISE_FLOOR, Result, Row

METRICS = {"psnr": "PSNR against dense, dB", "ssim": "SSIM against dense"}
TIMES = {"seconds": "s, one clip alone", "batch_seconds": "s a clip, in a batch"}
# Colours of Okabe and Ito, which everybody can tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "osD^vP*X"
# Methods of a paper other than the five are drawn alike.
NAMED = (
    "compensated_delta",
    "adaspa",
    "rettention",
    "sparse_vdit",
    "gna",
    "mminference",
    "fbcache",
    "taylorseer",
    "magcache",
)
OTHERS = "others"
# Arms that make a picture.
FEWEST_ARMS = 6


def group(row: Row) -> str:
    """The entry of the legend that an arm belongs to."""
    first, _, second = row.family.partition("+")
    if first not in NAMED:
        return OTHERS
    return f"cache + {second}" if second else first


def plot(results: Sequence[Result], path: Path, metric: str = "psnr") -> None:
    """Writes the picture: a row for each result, a column for each way to time.

    Arms of one series (the same but for its budget) are joined by a line.

    Args:
        results: What was measured; those of a few arms are left to the tables.
        path: Picture to write, e.g. ``*.svg``.
        metric: ``"psnr"`` or ``"ssim"``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [result for result in results if len(_drawn(result)) >= FEWEST_ARMS] or results
    plt.rcParams.update({"svg.hashsalt": "dit-sparse", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(
        len(results), 2, figsize=(11, 4.2 * len(results)), squeeze=False, layout="constrained"
    )
    groups = sorted(
        {group(row) for result in results for row in _drawn(result)},
        key=lambda name: (name == OTHERS, NAMED.index(name) if name in NAMED else len(NAMED), name),
    )
    turns = [divmod(i, len(COLOURS)) for i in range(len(groups))]
    style = {
        name: {
            "color": COLOURS[place],
            "marker": MARKERS[(place + 3 * turn) % len(MARKERS)],
            "linestyle": "--" if turn else "-",
        }
        for name, (turn, place) in zip(groups, turns, strict=True)
    }
    for result, line in zip(results, axes, strict=True):
        for (time, label), axis in zip(TIMES.items(), line, strict=True):
            _panel(axis, result, time, metric, style)
            axis.set(xlabel=label, ylabel=METRICS[metric], title=result.title)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _drawn(result: Result) -> list[Row]:
    return [row for row in result.rows.values() if not row.arm.startswith(("dense", NOISE_FLOOR))]


def _panel(
    axis: Any, result: Result, time: str, metric: str, style: dict[str, dict[str, Any]]
) -> None:
    series: dict[str, list[Row]] = defaultdict(list)
    for row in _drawn(result):
        if getattr(row, time):
            series[row.series].append(row)
    for rows in series.values():
        rows.sort(key=lambda row: (row.density or 0, getattr(row, time)))
        found = [getattr(row, metric) for row in rows]
        axis.errorbar(
            [getattr(row, time) for row in rows],
            [x.mean for x in found],
            yerr=[[x.mean - x.low for x in found], [x.high - x.mean for x in found]],
            label=group(rows[0]),
            markersize=4,
            linewidth=1,
            elinewidth=0.5,
            alpha=0.8,
            **style[group(rows[0])],
        )
    floor = result.rows.get(NOISE_FLOOR)
    if floor is not None:
        level = getattr(floor, metric)
        axis.axhline(level.mean, color="gray", linestyle="--", label="noise floor")
        axis.axhspan(level.low, level.high, color="gray", alpha=0.15, linewidth=0)
    dense = Row(result.dense)
    if getattr(dense, time):
        axis.axvline(getattr(dense, time), color="gray", linestyle=":", label="dense")
    axis.grid(alpha=0.3)
