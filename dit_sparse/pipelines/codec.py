"""A small learned video codec: 2x8x8-stride latents with 48 channels.

The codec is the counterpart of a video VAE. It is deterministic and tiny (about 0.6 M parameters)
because the clips it serves are synthetic; what matters is that the latents are smooth enough for a
diffusion transformer, and that every convolution is local in time and space, so that one set of
weights serves any clip length and size.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

TEMPORAL_STRIDE = 2
SPATIAL_STRIDE = 8


class SpatialBlock(nn.Module):
    """Residual pair of 3x3 convolutions applied to every frame on its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # Starting as the identity keeps the un-normalised network stable at a high learning rate.
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, C, H, W] to [N, C, H, W]."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class SpaceTimeBlock(nn.Module):
    """Residual (1, 3, 3) convolution followed by a (3, 1, 1) one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.temporal = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        nn.init.zeros_(self.temporal.weight)
        nn.init.zeros_(self.temporal.bias)

    def forward(self, x: torch.Tensor, frames: int) -> torch.Tensor:
        """Maps [B * frames, C, H, W] to the same shape."""
        h = self.spatial(F.silu(x))
        _, c, height, width = h.shape
        # Both factors of the separable 3-D convolution run as 2-D ones, which cuDNN handles far
        # better: the temporal factor sees frames as rows and all positions of a frame as columns.
        h = h.unflatten(0, (-1, frames)).transpose(1, 2).reshape(-1, c, frames, height * width)
        h = self.temporal(F.silu(h))
        h = h.transpose(1, 2).reshape(-1, c, height, width)
        return x + h


class PatchCodec(ModelMixin, ConfigMixin):
    """Video codec with latents of 1/2 the frames and 1/8 the height and width.

    Args:
        latent_channels: Channels of the latents.
        hidden_channels: Channels at latent resolution.
        mid_channels: Channels at one quarter of the input resolution.
        refine_channels: Channels of the full-resolution refinement of the decoder.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 48,
        hidden_channels: int = 96,
        mid_channels: int = 48,
        refine_channels: int = 16,
    ) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(3, mid_channels, 4, stride=4)
        self.encoder_mid = SpatialBlock(mid_channels)
        # Two frames are stacked in the channels before the last stride: a (2, 2, 2) convolution.
        self.down = nn.Conv2d(2 * mid_channels, hidden_channels, 2, stride=2)
        self.encoder_block = SpaceTimeBlock(hidden_channels)
        self.to_latent = nn.Conv2d(hidden_channels, latent_channels, 1)

        self.from_latent = nn.Conv2d(latent_channels, hidden_channels, 1)
        self.decoder_block = SpaceTimeBlock(hidden_channels)
        self.decoder_block2 = SpaceTimeBlock(hidden_channels)
        self.up = nn.Conv2d(hidden_channels, 2 * 4 * mid_channels, 1)
        self.decoder_mid = SpatialBlock(mid_channels)
        self.decoder_mid2 = SpatialBlock(mid_channels)
        self.unpatchify = nn.Conv2d(mid_channels, 16 * refine_channels, 1)
        self.refine1 = nn.Conv2d(refine_channels, refine_channels, 3, padding=1)
        self.refine2 = nn.Conv2d(refine_channels, 3, 3, padding=1)

        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    @staticmethod
    def latent_shape(frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (frames, height, width) of a clip size; ValueError if the size does not divide."""
        if frames <= 0 or frames % TEMPORAL_STRIDE:
            raise ValueError(
                f"expected a positive, even number of frames, got {frames}; "
                "repeat or drop one frame, for example 16 instead of 17"
            )
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % SPATIAL_STRIDE:
                raise ValueError(
                    f"expected {name} to be a positive multiple of {SPATIAL_STRIDE}, got {size}; "
                    f"use {max(SPATIAL_STRIDE, size // SPATIAL_STRIDE * SPATIAL_STRIDE)}"
                )
        return frames // TEMPORAL_STRIDE, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE

    def encode_raw(self, video: torch.Tensor) -> torch.Tensor:
        """Latents before normalisation, which is what codec training works on.

        Args:
            video: [B, 3, F, H, W] in [-1, 1].

        Returns:
            [B, latent_channels, F / 2, H / 8, W / 8].
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(
                f"expected a video of shape [B, 3, F, H, W], got {list(video.shape)}; "
                "move the channels to dimension 1"
            )
        batch, _, frames, height, width = video.shape
        latent_frames, _, _ = self.latent_shape(frames, height, width)
        x = video.transpose(1, 2).flatten(0, 1)
        x = self.encoder_mid(self.patchify(x))
        x = x.unflatten(0, (batch * latent_frames, TEMPORAL_STRIDE)).flatten(1, 2)
        x = self.encoder_block(self.down(x), latent_frames)
        x = self.to_latent(F.silu(x))
        return x.unflatten(0, (batch, latent_frames)).transpose(1, 2)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        """Video of un-normalised latents: [B, C, f, h, w] to [B, 3, 2 * f, 8 * h, 8 * w]."""
        self._check_latents(latents)
        batch, _, frames, _, _ = latents.shape
        x = latents.transpose(1, 2).flatten(0, 1)
        x = self.decoder_block(self.from_latent(x), frames)
        x = self.decoder_block2(x, frames)
        x = F.pixel_shuffle(self.up(F.silu(x)), 2)
        x = x.unflatten(1, (TEMPORAL_STRIDE, -1)).flatten(0, 1)
        x = self.decoder_mid2(self.decoder_mid(x))
        x = F.pixel_shuffle(self.unpatchify(F.silu(x)), 4)
        x = self.refine2(F.silu(x + self.refine1(F.silu(x))))
        return x.unflatten(0, (batch, frames * TEMPORAL_STRIDE)).transpose(1, 2)

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that latents do not depend on."""
        parts = (
            self.from_latent,
            self.decoder_block,
            self.decoder_block2,
            self.up,
            self.decoder_mid,
            self.decoder_mid2,
            self.unpatchify,
            self.refine1,
            self.refine2,
        )
        return [parameter for part in parts for parameter in part.parameters()]

    def _check_latents(self, latents: torch.Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(
                f"expected latents of shape [B, {channels}, f, h, w], got {list(latents.shape)}; "
                "pass what encode() or the transformer returned"
            )

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, -1, 1, 1, 1)
        mean = self.latent_mean.to(like.dtype).view(shape)
        return mean, self.latent_std.to(like.dtype).view(shape)

    @apply_forward_hook
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Encodes a video.

        Args:
            video: [B, 3, F, H, W] in [-1, 1], F even, H and W multiples of 8.

        Returns:
            Latents [B, latent_channels, F / 2, H / 8, W / 8] with unit variance per channel.
        """
        latents = self.encode_raw(video)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents [B, C, f, h, w] to a video [B, 3, 2 * f, 8 * h, 8 * w], about [-1, 1]."""
        self._check_latents(latents)
        mean, std = self._statistics(latents)
        return self.decode_raw(latents * std + mean)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Reconstruction of a video [B, 3, F, H, W]."""
        return self.decode(self.encode(video))
