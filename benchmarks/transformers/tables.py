"""The results of one transformer as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def model_table(name: str, found: dict[str, Any]) -> str:
    """Everything that ``found`` holds about the model called ``name``, for a terminal."""
    model = found["model"]
    layers = " + ".join(str(n) for n in model["layers"].values())
    real = " + ".join(str(n) for n in model["real_layers"].values())
    lines = [
        "",
        f"{name}: {model['kind']}, {model['tokens']:,} tokens, batch {model['batch']}, "
        f"{len(model['branches'])} forward pass(es) a step, {model['dtype']}; {layers} of {real} "
        "layers are built",
    ]
    for mode in ("eager", "compiled"):
        if mode in found:
            lines += _mode(mode, found[mode])
    for method, profile in found.get("profile", {}).items():
        if profile is not None:
            lines += _profile(method, profile, found["eager"])
    lines += [f"{part} failed: {error}" for part, error in found.get("errors", {}).items()]
    return "\n".join(lines)


def _mode(mode: str, found: dict[str, Any]) -> Iterator[str]:
    yield f"{mode}: forward = rest + (measured - rest) x {found['ratio']:g}"
    yield (
        f"  {'':30s} {'steps':>5s} {'measured ms':>18s} {'host ms':>9s} {'forward ms':>11s} "
        f"{'attention ms':>18s}"
    )
    for row in found["dense"]:
        steps = ""
        inside = row["attention_share"] * row["forward_ms"]
        yield _row(row["arm"], steps, row["measured"], row["forward_ms"], inside)
    for backend, error in found["unusable_backends"].items():
        yield f"  {backend}: {error}"
    for row in found["sparse"]:
        for phase, part in row["phases"].items():
            yield _row(
                f"{row['method']}, {phase}", part["steps"], part["measured"], part["forward_ms"],
                part["attention_ms"],
            )  # fmt: skip
    yield "  forward passes of a generation:"
    for row in found["dense"]:
        yield (
            f"  {row['arm']}: {row['total']}; peak {row['peak_gb']:.1f} GB, "
            f"{row['peak_full_gb']:.1f} with all layers"
        )
    fastest = next(row for row in found["dense"] if row["arm"] == found["fastest"])
    for row in found["sparse"]:
        more = row["peak_full_gb"] / fastest["peak_full_gb"] - 1 if fastest["peak_gb"] else 0.0
        low, high = row["head_density"]
        speedup = ", ".join(f"{x:.2f}x over {name}" for name, x in row["speedup"].items())
        yield (
            f"  {row['method']}: {row['total']}; peak {row['peak_gb']:.1f} GB, "
            f"{row['peak_full_gb']:.1f} with all layers ({100 * more:+.1f} %)"
        )
        yield f"    {speedup} (fastest backend: {found['fastest']})"
        yield (
            f"    density {row['density']:.3f} (heads {low:.3f} to {high:.3f}); were attention "
            f"free: {row['limit_free_attention']:.2f}x over the fastest dense pass, "
            f"{row['limit_free_sparse_steps']:.2f}x if in sparse steps only"
        )
        for against, text in row["verdicts"].items():
            yield f"    against {against}: {text}"
        for note in row["notes"]:
            yield f"    {note}"


def _row(
    label: str, steps: int | str, measured: dict[str, Any], forward: float, attention: float
) -> str:
    passes = f"{measured['ms']:9.2f} ±{100 * measured['spread']:4.1f} %"
    share = f"{attention:9.1f} ({100 * attention / forward:4.1f} %)"
    return (
        f"  {label:30s} {steps:>5} {passes:>18s} {measured['host_ms']:9.2f} {forward:11.1f} "
        f"{share:>18s}"
    )


def _profile(method: str, profile: dict[str, Any], eager: dict[str, Any]) -> Iterator[str]:
    row = next(row for row in eager["sparse"] if row["method"] == method)
    step = row["phases"]["sparse"]["measured"]
    total = profile["total_ms"]
    yield (
        f"profile of one sparse pass, {method}: {total:.2f} ms in kernels, {step['ms']:.2f} ms "
        f"unprofiled, {step['host_ms']:.2f} ms on the host"
    )
    for kind, ms in profile["by_category"].items():
        share = 100 * ms / max(total, 1e-9)
        yield f"  {kind:24s} {ms:9.3f} ms {share:5.1f} % {profile['kernels'][kind]:6d} calls"
    for text in profile["verdicts"]:
        yield f"  {text}"
    yield "  longest:"
    for kernel, kind, ms, calls in profile["largest"]:
        yield f"  {ms:9.3f} ms {calls:5d} x {kind:24s} {kernel[:70]}"
