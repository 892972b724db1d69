"""PSNR and SSIM between two clips, on lossless frames.

Both metrics read the float frames that the pipeline returned, never an encoded video: the loss of
a video codec (30 to 40 dB) would hide everything that sparse attention changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


@dataclass(frozen=True)
class Quality:
    """Distance of a clip from its reference.

    Attributes:
        psnr: PSNR of every frame in dB; inf where the frames are identical.
        ssim: SSIM of every frame.
        psnr_clip: PSNR of the squared error over the whole clip.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    psnr_clip: float

    @property
    def identical_frames(self) -> int:
        """Frames that equal the reference bit for bit."""
        return sum(math.isinf(value) for value in self.psnr)

    @property
    def psnr_mean(self) -> float:
        """Mean PSNR over the frames that differ; inf only if all frames are identical.

        One identical frame would otherwise make the mean of a poor clip infinite.
        """
        finite = [value for value in self.psnr if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.inf

    @property
    def psnr_min(self) -> float:
        """PSNR of the worst frame."""
        return min(self.psnr)

    @property
    def ssim_mean(self) -> float:
        """Mean SSIM over all frames."""
        return sum(self.ssim) / len(self.ssim)


def check_frames(frames: NDArray, name: str = "frames") -> NDArray[np.float64]:
    """Validates a clip for the metrics.

    Args:
        frames: Floating-point [F, H, W, 3] in 0..1.
        name: What to call it in errors.

    Returns:
        The clip in double precision.

    Raises:
        ValueError: If it is something else; says what, and how to convert it.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"expected {name} of shape [F, H, W, 3], got {list(frames.shape)}; "
            "pass one clip, for example pipe(...).frames[0]"
        )
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(
            f"expected {name} as floats in 0..1, got {frames.dtype}; integer differences wrap and "
            "rounding hides small errors: generate with output_type='np'"
        )
    low, high = float(frames.min()), float(frames.max())
    # Written so that NaN fails too.
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"expected {name} in 0..1, got values from {low:g} to {high:g}; divide 8-bit values by "
            "255, map -1..1 with x / 2 + 0.5; if it is nan, the generation itself failed"
        )
    return frames.astype(np.float64)


def _check_pair(clip: NDArray, reference: NDArray) -> tuple[NDArray, NDArray]:
    clip, reference = check_frames(clip, "clip"), check_frames(reference, "reference")
    if clip.shape != reference.shape:
        raise ValueError(
            f"expected clips of the same shape, got {list(clip.shape)} and "
            f"{list(reference.shape)}; generate both with the same frames, height and width"
        )
    return clip, reference


def psnr_frames(clip: NDArray, reference: NDArray) -> tuple[float, ...]:
    """PSNR of every frame in dB, peak 1; inf where the frames are identical.

    Args:
        clip: Floating-point [F, H, W, 3] in 0..1.
        reference: Same shape.
    """
    clip, reference = _check_pair(clip, reference)
    return tuple(_psnr(a, b) for a, b in zip(clip, reference, strict=True))


def psnr_clip(clip: NDArray, reference: NDArray) -> float:
    """PSNR of the squared error over the whole clip in dB, peak 1; inf if identical.

    Args:
        clip: Floating-point [F, H, W, 3] in 0..1.
        reference: Same shape.
    """
    return _psnr(*_check_pair(clip, reference))


def _psnr(a: NDArray, b: NDArray) -> float:
    from skimage.metrics import mean_squared_error

    error = float(mean_squared_error(a, b))
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim_frames(clip: NDArray, reference: NDArray) -> tuple[float, ...]:
    """SSIM of every frame, averaged over pixels and colour channels.

    The setting of Wang et al. 2004: an 11x11 Gaussian window of deviation 1.5, population
    covariance, peak 1.

    Args:
        clip: Floating-point [F, H, W, 3] in 0..1, at least 11x11 pixels.
        reference: Same shape.
    """
    from skimage.metrics import structural_similarity

    clip, reference = _check_pair(clip, reference)
    _, height, width, _ = clip.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"expected frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels for SSIM, got "
            f"{height}x{width}; generate larger frames"
        )
    return tuple(
        float(
            structural_similarity(
                a,
                b,
                data_range=1.0,
                channel_axis=-1,
                gaussian_weights=True,
                sigma=SSIM_SIGMA,
                use_sample_covariance=False,
            )
        )
        for a, b in zip(clip, reference, strict=True)
    )


def compare_clips(clip: NDArray, reference: NDArray) -> Quality:
    """All metrics of ``clip`` against ``reference``.

    Args:
        clip: Floating-point [F, H, W, 3] in 0..1, at least 11x11 pixels.
        reference: Same shape.
    """
    return Quality(
        psnr=psnr_frames(clip, reference),
        ssim=ssim_frames(clip, reference),
        psnr_clip=psnr_clip(clip, reference),
    )
