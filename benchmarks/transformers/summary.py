"""From measured passes to a whole generation, and what stands between it and the goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How a pass with few layers becomes one with all.

    Attributes:
        rest_ms: The pass without blocks.
        ratio: Real depth over the depth that was built.
    """

    rest_ms: float
    ratio: float

    def forward(self, ms: float) -> float:
        """Milliseconds with all layers: blocks take as long each, the rest is there once."""
        return self.rest_ms + (ms - self.rest_ms) * self.ratio

    def line(self, ms: float) -> str:
        """:meth:`forward`, written out."""
        return (
            f"{self.rest_ms:.2f} + ({ms:.2f} - {self.rest_ms:.2f}) x {self.ratio:g} = "
            f"{self.forward(ms):.1f} ms"
        )


@dataclass(frozen=True)
class Total:
    """A generation, in seconds, and how that comes about."""

    seconds: float
    line: str


def total(counts: Mapping[str, int], forward_ms: Mapping[str, float], branches: int) -> Total:
    """``branches`` passes a step, ``counts`` steps of every phase."""
    seconds = branches * sum(n * forward_ms[phase] for phase, n in counts.items()) / 1e3
    parts = " + ".join(f"{n} {phase} x {forward_ms[phase]:.1f}" for phase, n in counts.items())
    return Total(seconds, f"{branches} x ({parts}) ms = {seconds:.1f} s")


def free_attention_limits(
    counts: Mapping[str, int], forward_ms: float, attention_ms: float
) -> tuple[float, float]:
    """Speed-ups over dense if attention cost nothing (Amdahl): everywhere; in sparse steps alone.

    Args:
        counts: Steps by phase.
        forward_ms: A dense pass.
        attention_ms: Self-attention's part of it.
    """
    steps = sum(counts.values())
    dense = sum(n for phase, n in counts.items() if phase in ("dense", "search"))
    left = forward_ms - attention_ms
    return forward_ms / left, steps * forward_ms / (dense * forward_ms + (steps - dense) * left)


@dataclass(frozen=True)
class Floor:
    """The fastest dense pass, and self-attention's part of it, milliseconds with all layers."""

    forward_ms: float
    attention_ms: float


def verdict(
    goal: float,
    reached: float,
    dense_ms: float,
    counts: Mapping[str, int],
    forward_ms: Mapping[str, float],
    attention_ms: float,
    density: float,
    floor: Floor,
) -> str:
    """Whether a goal is met, or else what forbids it.

    Args:
        goal: Speed-up aimed at, over dense passes of ``dense_ms``.
        reached: Speed-up measured.
        dense_ms: The dense pass that it is compared with.
        counts: Steps by phase.
        forward_ms: A pass of every phase.
        attention_ms: Self-attention's part of a sparse pass.
        density: Of a sparse pass.
        floor: What a sparse pass is made of at best.
    """
    if reached >= goal:
        return f"goal {goal:g}x met: {reached:.2f}x"
    steps, sparse = sum(counts.values()), counts.get("sparse", 0)
    if not sparse:
        return f"goal {goal:g}x missed: {reached:.2f}x, no step is sparse"
    others = sum(n * forward_ms[phase] for phase, n in counts.items() if phase != "sparse")
    allowed = (steps * dense_ms / goal - others) / sparse
    outside, ideal = floor.forward_ms - floor.attention_ms, floor.attention_ms * density
    text = (
        f"goal {goal:g}x missed: {reached:.2f}x; a sparse pass may take {allowed:.1f} ms and takes "
        f"{forward_ms['sparse']:.1f}, {attention_ms:.1f} of it in attention (at best "
        f"{floor.attention_ms:.1f} x density {density:.3f} = {ideal:.1f}); the fastest dense pass "
        f"has {outside:.1f} outside attention: "
    )
    if allowed < outside:
        return text + "with this many dense steps no attention, however fast, meets it"
    if allowed < outside + ideal:
        return text + "not at this density, even as efficient as the dense kernel"
    return text + "what sparse attention takes beyond its density forbids it"
