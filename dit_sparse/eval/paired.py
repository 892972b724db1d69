"""Statistics over clips: every arm is compared with another one on the same captions and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
# A clip that equals its reference has infinite PSNR; differences need a number.
PSNR_CEILING = 100.0


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap confidence interval.

    Attributes:
        mean: Of the sample.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval (bias-corrected, accelerated bootstrap over clips).

    Args:
        values: One number a clip; infinities count as ``PSNR_CEILING``.
    """
    from scipy.stats import bootstrap

    sample = np.array([min(v, PSNR_CEILING) for v in values], dtype=np.float64)
    if sample.size == 0:
        raise ValueError("expected at least one clip, got none")
    mean = float(sample.mean())
    if sample.size == 1 or np.ptp(sample) == 0:
        return Interval(mean, mean, mean)
    found = bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = (mean if math.isnan(x) else float(x) for x in (found.low, found.high))
    return Interval(mean, low, high)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean and 95 % interval of ``values - others``, clip by clip.

    Args:
        values: One number a clip.
        others: The same clips under another arm.
    """
    if len(values) != len(others):
        raise ValueError(f"expected the same clips twice, got {len(values)} and {len(others)}")
    pairs = zip(values, others, strict=True)
    return bootstrap_mean([min(a, PSNR_CEILING) - min(b, PSNR_CEILING) for a, b in pairs])
