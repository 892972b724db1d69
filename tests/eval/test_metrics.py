"""PSNR and SSIM against values computed by hand, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_sparse.eval.metrics import compare_clips, psnr_clip, psnr_frames, ssim_frames


def clip(frames: int = 2, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((frames, size, size, 3), dtype=np.float32)


def test_psnr_of_a_constant_error() -> None:
    black = np.zeros((2, 16, 16, 3), np.float32)
    other = black.copy()
    other[0] += 0.1
    other[1] += 0.01
    # MSE 1e-2 and 1e-4, and their mean over the clip.
    assert psnr_frames(other, black) == pytest.approx((20.0, 40.0), abs=1e-4)
    assert psnr_clip(other, black) == pytest.approx(-10 * math.log10(0.00505), abs=1e-4)
    quality = compare_clips(other, black)
    assert quality.psnr_mean == pytest.approx(30.0, abs=1e-4)
    assert quality.psnr_min == pytest.approx(20.0, abs=1e-4)


def test_ssim_of_constant_frames() -> None:
    a = np.full((1, 16, 16, 3), 0.25)
    b = np.full((1, 16, 16, 3), 0.75)
    # Without variance only the luminance term is left: (2 m n + C1) / (m^2 + n^2 + C1).
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim_frames(a, b) == pytest.approx((expected,), abs=1e-9)


def test_ssim_uses_an_11_pixel_gaussian() -> None:
    a, b = clip(1, 11, 0)[..., :1], clip(1, 11, 1)[..., :1]
    x = np.arange(-5, 6)
    line = np.exp(-(x**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    # At 11 pixels the only fully covered position, which is all that counts, is the centre.
    p, q = a[0, :, :, 0].astype(float), b[0, :, :, 0].astype(float)
    mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
    var_p = (weights * p**2).sum() - mean_p**2
    var_q = (weights * q**2).sum() - mean_q**2
    cov = (weights * p * q).sum() - mean_p * mean_q
    c1, c2 = 0.01**2, 0.03**2
    expected = ((2 * mean_p * mean_q + c1) * (2 * cov + c2)) / (
        (mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2)
    )
    a3, b3 = (np.repeat(c, 3, axis=-1) for c in (a, b))
    assert ssim_frames(a3, b3) == pytest.approx((expected,), abs=1e-6)


def test_identical_clips_are_infinite_and_not_capped() -> None:
    quality = compare_clips(clip(), clip())
    assert quality.psnr == (math.inf, math.inf)
    assert quality.psnr_mean == quality.psnr_min == quality.psnr_clip == math.inf
    assert quality.ssim_mean == 1.0
    assert quality.identical_frames == 2


def test_one_identical_frame_does_not_hide_the_others() -> None:
    a, b = np.zeros((2, 16, 16, 3)), np.zeros((2, 16, 16, 3))
    b[1] += 0.1
    quality = compare_clips(b, a)
    assert quality.psnr_mean == quality.psnr_min == pytest.approx(20.0)
    assert quality.identical_frames == 1


def test_tiny_errors_are_measured() -> None:
    a = np.full((1, 16, 16, 3), 0.5, np.float32)
    assert 120 < psnr_clip(a + np.float32(1e-7), a) < 160


def test_wrapped_integers_are_refused() -> None:
    # The trap: an error of 247 wraps to 9.
    assert (np.array([3], np.uint8) - np.array([250], np.uint8)).item() == 9
    frames = (clip() * 255).astype(np.uint8)
    with pytest.raises(ValueError, match=r"floats in 0\.\.1, got uint8"):
        psnr_frames(frames, frames)
    with pytest.raises(ValueError, match="values from 0 to 255"):
        psnr_frames(np.linspace(0, 255, 768).reshape(1, 16, 16, 3), clip(1))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (clip() - 0.5, clip(), "divide 8-bit values"),
        (clip() * np.nan, clip(), "nan"),
        (clip()[0], clip(), r"shape \[F, H, W, 3\]"),
        (clip(2), clip(3), "same shape"),
        (clip(0), clip(0), r"got \[0, 16, 16, 3\]"),
        (clip(1, 10), clip(1, 10), "at least 11x11"),
    ],
)
def test_refusals(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssim_frames(a, b)
