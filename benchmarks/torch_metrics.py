"""PSNR and SSIM of many clips on the device that made them; equal to `dit_sparse.eval.metrics`.

scikit-image takes seconds a clip on one core, which on a machine with a GPU is most of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.eval.metrics import SSIM_SIGMA, SSIM_WINDOW

# Those of Wang et al. 2004 and of scikit-image.
_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True)
class ClipQuality:
    """Distance of clips from their references, one number a clip.

    Attributes:
        psnr: Mean over the frames that differ, dB; inf if all are identical.
        psnr_min: Of the worst frame.
        psnr_clip: Of the squared error over the whole clip.
        ssim: Mean over frames.
    """

    psnr: list[float]
    psnr_min: list[float]
    psnr_clip: list[float]
    ssim: list[float]


def compare(clips: Tensor, references: Tensor) -> ClipQuality:
    """Metrics of every clip.

    Args:
        clips: ``[batch, frames, 3, height, width]`` in 0..1.
        references: Same shape.

    Raises:
        ValueError: On different shapes, values outside 0..1 (NaN is) or frames below the window.
    """
    if clips.ndim != 5 or clips.shape != references.shape:
        raise ValueError(
            f"expected clips and references of one shape [B, F, 3, H, W], got {list(clips.shape)} "
            f"and {list(references.shape)}"
        )
    if min(clips.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"expected frames of {SSIM_WINDOW} pixels or more, got {clips.shape[-2:]}")
    for name, x in (("clips", clips), ("references", references)):
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError(f"expected {name} in 0..1, got {x.min():g} to {x.max():g}")
    psnr, least, whole, ssim = [], [], [], []
    # Clip by clip: windows in double precision take ten times the room of the frames.
    for clip, reference in zip(clips.double(), references.double(), strict=True):
        error = (clip - reference).square().mean((1, 2, 3))
        frames = -10 * error.log10()
        differing = frames[frames.isfinite()]
        psnr.append(float(differing.mean() if len(differing) else frames[0]))
        least.append(float(frames.min()))
        whole.append(float(-10 * error.mean().log10()))
        ssim.append(float(_ssim(clip, reference)))
    return ClipQuality(psnr, least, whole, ssim)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of frames ``[frames, 3, height, width]``, peak 1, away from the border."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    window = torch.softmax(-(offsets**2) / (2 * SSIM_SIGMA**2), 0)

    def bands(size: int) -> Tensor:
        # A window as a matrix: the product with it is the convolution where it fits.
        rows = torch.arange(size - SSIM_WINDOW + 1, device=x.device)[:, None]
        band = x.new_zeros(len(rows), size)
        return band.scatter_(1, rows + torch.arange(SSIM_WINDOW, device=x.device), window.expand(
            len(rows), -1
        ))  # fmt: skip

    down, across = bands(x.shape[-2]), bands(x.shape[-1]).T
    mean_x, mean_y, xx, yy, xy = (down @ image @ across for image in (x, y, x * x, y * y, x * y))
    luminance = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    variances = xx - mean_x**2 + yy - mean_y**2
    return (luminance * (2 * (xy - mean_x * mean_y) + _K2**2) / (variances + _K2**2)).mean()
