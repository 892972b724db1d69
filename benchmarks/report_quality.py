"""Tables, facts and plots from evidence files.

    python -m benchmarks.report_quality benchmarks/results/evidence-*.json \\
        --output docs/evidence.md --sheet docs/worst-clips.webp \\
        --plot docs/quality.svg --plot-ssim docs/quality-ssim.svg

Nothing in them is typed by hand: intervals and answers are computed here, on any machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality_plot import plot
from benchmarks.quality_results import NOISE_FLOOR, Result, Row, read_claims
from benchmarks.worst_clips import frames_path, load, write_sheet
from dit_sparse.eval.paired import CONFIDENCE, Interval

CLAIMS = Path(__file__).parent / "arms" / "claims.txt"
# How far from its target a density is without a remark; also a tenth of a target below it.
NEAR = 0.01
LEVELS = (30.0, 35.0, 40.0, 45.0)
HEAD = (
    "arm",
    "density",
    "of sparse steps",
    "PSNR",
    "worst clip",
    "SSIM",
    "s",
    "speed-up",
    "s in a batch",
    "speed-up",
)


def interval(x: Interval, digits: int = 2, sign: str = "") -> str:
    """Mean and ends, e.g. ``"31.20 (29.00 to 33.10)"``."""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (x.mean, x.low, x.high))
    return f"{mean} ({low} to {high})"


def number(value: float | None, digits: int, suffix: str = "") -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{suffix}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def arm_table(result: Result, rows: Sequence[Row], against: str | None) -> str:
    """Arms with all that was measured, and what the arm ``against`` is short of."""
    measured = against in result.rows
    head = [*HEAD, *([f"PSNR - `{against}`"] if measured else [])]
    lines = []
    for row in rows:
        cells = [
            f"`{row.arm}`",
            number(row.density, 3),
            number(row.sparse_density, 3) + ("" if _is_near(row) else " (nearest)"),
            interval(row.psnr),
            f"{row.worst:.2f}",
            interval(row.ssim, 4),
            number(row.seconds, 3),
            number(row.speedup, 2, "x"),
            number(row.batch_seconds, 3),
            number(row.batch_speedup, 2, "x"),
        ]
        if measured:
            gap = result.difference(row.arm, str(against))
            is_itself = row.arm == against or gap is None
            cells.append("–" if is_itself or gap is None else interval(gap[0], sign="+"))
        lines.append(cells)
    return markdown(head, lines)


def _is_near(row: Row) -> bool:
    target = row.data.get("target")
    if target is None:
        return True
    found = row.density if row.data.get("target_is_whole") else row.sparse_density
    return found is not None and abs(found - target) <= min(NEAR, target / 10)


def section(result: Result) -> str:
    """Everything about one result."""
    s, machine = result.settings, result.data["machine"]
    dense = Row(result.dense)
    where = machine["gpu"] or machine["cpu"]
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("driver", "torch", "triton", "diffusers")
        if machine.get(name)
    )
    alone = ""
    if dense.seconds is not None:
        times = len(dense.data["seconds"])
        alone = f"{dense.seconds:.3f} s a clip alone (median of {times}), "
    parts = [
        f"## {result.title}",
        f"{where} ({versions}), {s['dtype']}, guidance {s['guidance']:g}, {len(s['captions'])} "
        f"captions, batches of {s['batch']}. Dense: {alone}{number(dense.batch_seconds, 3)} s a "
        "clip in a batch.",
    ]
    if result.data.get("remark"):
        parts.append(result.data["remark"])
    parts += [
        f"`{row.arm}`: {row.data['remark']}."
        for row in result.rows.values()
        if row.data.get("remark")
    ]
    drifts = [
        f"{statistics.median(s['dense_seconds']):.3f} to "
        f"{statistics.median(s['dense_seconds_after']):.3f} s"
        for s in result.data["sessions"]
        if s.get("dense_seconds") and s.get("dense_seconds_after")
    ]
    if drifts:
        parts.append(f"Dense at the beginning and the end of each session: {', '.join(drifts)}.")
    yardsticks = [row for row in result.rows.values() if row.arm.startswith(("dense", NOISE_FLOOR))]
    if yardsticks:
        parts += ["What another kernel or another batch alone changes:"]
        parts.append(arm_table(result, yardsticks, None))
    for target in result.targets:
        rows = [r for r in result.rows.values() if r.data.get("target") == target]
        rows.sort(key=lambda row: -row.psnr.mean)
        parts.append(f"### Density {target:g} in the sparse steps")
        parts.append(arm_table(result, rows, f"adaspa@{target:g}"))
    rest = [
        row
        for row in result.rows.values()
        if row not in yardsticks and (row.data.get("target") is None or "@=" in row.arm)
    ]
    for title, rows in (
        ("Arms as they are set", [row for row in rest if not _cached(row)]),
        ("Step caches", [row for row in rest if _cached(row)]),
    ):
        if rows:
            parts += [f"### {title}", arm_table(result, rows, "compensated_delta")]
    parts += facts(result)
    return "\n\n".join(parts)


def _cached(row: Row) -> bool:
    return row.family.partition("+")[0] in ("fbcache", "taylorseer", "magcache")


def facts(result: Result) -> list[str]:
    """Claims that were borne out or not, the fastest arms, and what did not run."""
    parts = []
    verdicts = result.verdicts(read_claims(CLAIMS))
    if verdicts:
        rows = [
            [
                v.text,
                v.answer,
                "–" if v.difference is None else interval(v.difference, sign="+"),
                f"{v.clips}",
            ]
            for v in verdicts
            if v.difference is not None
        ]
        parts.append("### Which claims hold")
        if rows:
            parts.append(markdown(("claim", "holds", "difference, dB", "clips"), rows))
        open_ones = [v.text for v in verdicts if v.difference is None]
        if open_ones:
            parts.append(f"Not measured: {'; '.join(open_ones)}.")
    for time, name in (("seconds", "one clip alone"), ("batch_seconds", "in a batch")):
        front = result.front(time)
        if front:
            dense = getattr(Row(result.dense), time)
            parts.append(f"### Fastest for its quality, {name}")
            parts.append(_front_text(front, time, dense))
    errors = [row for row in result.data["rows"] if "error" in row]
    missing = [(row["arm"], row["error"]) for row in errors]
    late = []
    for skip in result.data["skipped"]:
        # A run has a budget; how long an arm would have taken tells nobody anything.
        if "no time left" in skip["reason"] or "more than is left" in skip["reason"]:
            late.append(f"`{skip['arm']}`")
        else:
            missing.append((skip["arm"], skip["reason"]))
    if missing or late:
        parts.append("### Arms without a result")
        lines = [f"* `{arm}`: {reason}" for arm, reason in missing]
        if late:
            lines.append(f"* for want of time: {', '.join(late)}")
        parts.append("\n".join(lines))
    return parts


def overview(results: Sequence[Result]) -> list[str]:
    """Every claim with its answer in each result that tells something of any."""
    claims = read_claims(CLAIMS)
    cells: dict[str, dict[int, str]] = {}
    for place, result in enumerate(results):
        for verdict in result.verdicts(claims):
            if verdict.difference is not None:
                answer = f"{verdict.answer}, {verdict.difference.mean:+.1f}"
                cells.setdefault(verdict.text, {})[place] = answer
    if not cells:
        return []
    places = sorted({place for row in cells.values() for place in row})
    rows = [[text, *(row.get(place, "–") for place in places)] for text, row in cells.items()]
    return [
        "## Claims",
        "Whether the first arm is nearer to dense than the second, by how many dB on average. "
        "*Not separated*: the interval of the difference holds zero.",
        markdown(["claim", *(results[place].title for place in places)], rows),
    ]


def _front_text(front: Sequence[Row], time: str, dense: float | None) -> str:
    lines = [
        f"* `{row.arm}`: {getattr(row, time):.3f} s, {interval(row.psnr)} dB"
        + (f", {dense / getattr(row, time):.2f}x dense" if dense else "")
        for row in front
    ]
    lines = ["No arm is both faster and nearer to dense than one of these:", "", *lines, ""]
    for level in LEVELS:
        good = [row for row in front if row.psnr.mean >= level]
        found = f"`{good[0].arm}`, {getattr(good[0], time):.3f} s" if good else "none"
        lines.append(f"* Fastest with a mean of {level:g} dB or more: {found}.")
    return "\n".join(lines)


def document(
    results: Sequence[Result], pictures: Sequence[tuple[str, Path]], folder: Path, command: str
) -> str:
    """The whole page.

    Args:
        results: What was measured.
        pictures: Caption and path of each.
        folder: Where the page will be.
        command: How the numbers are made.
    """
    parts = [
        "# Evidence",
        "The embedded model under many arms, every clip compared with the dense clip of the same "
        "caption and noise. PSNR is the mean over frames, in dB, on the float frames that the "
        "pipeline returns; SSIM has an 11x11 Gaussian window. Parentheses hold "
        f"{CONFIDENCE:.0%} bootstrap intervals over captions; differences are paired, caption by "
        "caption. Density is that of the whole generation, where dense steps count 1, and that of "
        "the sparse steps; `@0.1` means that an arm was turned until the latter is 0.1, "
        "`@=ARM` until the former is that of ARM. Step caches skip whole blocks, which density "
        "does not tell. Seconds are those of a whole generation of one clip alone, and of a clip "
        "in a batch.",
        f"Made with `{command}`; this page by `python -m benchmarks.report_quality`.",
    ]
    parts += [f"![{text}]({os.path.relpath(path, folder)})" for text, path in pictures]
    parts += overview(results)
    parts += [section(result) for result in results]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="JSON files of benchmarks.quality")
    add("--output", type=Path, required=True, help="Markdown page to write")
    add("--plot", type=Path, help="picture of PSNR against time to write (svg, png)")
    add("--plot-ssim", type=Path, help="the same of SSIM")
    add("--sheet", type=Path, help="picture of the first result's worst clips to write (webp)")
    options = parser.parse_args(arguments)
    results = [Result.load(path) for path in options.results]
    pictures = []
    for metric, path in (("psnr", options.plot), ("ssim", options.plot_ssim)):
        if path is not None:
            plot(results, path, metric)
            pictures.append((f"{metric.upper()} against measured time", path))
    if options.sheet is not None:
        write_sheet(load(frames_path(options.results[0])), options.sheet)
        pictures.append(
            (f"worst clips at {results[0].title}: dense, sparse, difference", options.sheet)
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.quality --size … --arms benchmarks/arms/….txt --output …"
    page = document(results, pictures, options.output.parent, command)
    options.output.write_text(page, encoding="utf-8")
    print(f"{options.output}: {sum(len(r.rows) for r in results)} arms")


if __name__ == "__main__":
    main()
