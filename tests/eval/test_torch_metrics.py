"""Metrics on the device against those of scikit-image."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.torch_metrics import compare
from dit_sparse.eval.metrics import compare_clips


@pytest.mark.parametrize("noise", [0.3, 0.03, 1e-4])
def test_equal_to_the_reference(noise: float) -> None:
    rng = torch.Generator().manual_seed(0)
    smooth = torch.rand(2, 3, 3, 5, 7, generator=rng)
    reference = torch.nn.functional.interpolate(smooth, size=(3, 33, 48)).transpose(1, 2)
    reference = reference.contiguous()
    clips = (reference + noise * torch.randn(reference.shape, generator=rng)).clamp(0, 1)
    # Frames that are identical count in SSIM and not in the mean PSNR.
    clips[1, 1] = reference[1, 1]
    found = compare(clips, reference)
    for i in range(2):
        numpy = [x[i].permute(0, 2, 3, 1).numpy() for x in (clips, reference)]
        expected = compare_clips(*numpy)
        assert found.psnr[i] == pytest.approx(expected.psnr_mean, abs=1e-9)
        assert found.psnr_min[i] == pytest.approx(expected.psnr_min, abs=1e-9)
        assert found.psnr_clip[i] == pytest.approx(expected.psnr_clip, abs=1e-9)
        assert found.ssim[i] == pytest.approx(expected.ssim_mean, abs=1e-9)


def test_identical_clips() -> None:
    clip = torch.rand(1, 2, 3, 16, 16)
    found = compare(clip, clip)
    assert found.psnr == found.psnr_min == found.psnr_clip == [math.inf]
    assert found.ssim == pytest.approx([1.0])


def test_what_is_no_clip_is_refused() -> None:
    clip = torch.rand(1, 2, 3, 16, 16)
    for wrong in (clip[:, :1], clip[0], clip + 1, clip * math.nan):
        with pytest.raises(ValueError):
            compare(wrong, clip)
    with pytest.raises(ValueError):
        compare(clip[..., :8], clip[..., :8])
