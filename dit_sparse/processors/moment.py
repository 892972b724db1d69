"""Which denoising step a forward pass belongs to, as far as pipeline and timestep tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a call is named where the pipeline names none.
UNNAMED = "call"


@dataclass(frozen=True, slots=True)
class Moment:
    """What the pipeline and the timestep tell about one forward pass.

    Attributes:
        name: Name of the cache context.
        index: Denoising step, where the cache context tells it.
        total: Number of steps, where anything tells it.
        value: The timestep; only read where the context does not tell both.
        position: ``index``, else the place of the timestep among the scheduler's.
        noise: Noise level as a share of that of the first step, where the scheduler or the context
            tells it.
    """

    name: str | None
    index: int | None
    total: int | None
    value: float | None
    position: int | None
    noise: float | None = None

    @property
    def kind(self) -> tuple[int | None, bool]:
        """What stays the same within one generation."""
        return self.total, self.index is not None

    @classmethod
    def read(
        cls, context: Any, timestep: Tensor | None, timesteps: tuple[float, ...] | None
    ) -> Moment:
        """Asks the cache context first, and the timestep for what that leaves open.

        Args:
            context: The pipeline's cache context, or None.
            timestep: The model's timestep argument.
            timesteps: The distinct timesteps of this generation, where the pipeline is known.

        Raises:
            RuntimeError: If neither tells the step.
        """
        name = getattr(context, "name", None)
        index = getattr(context, "step_index", None)
        total = getattr(context, "num_inference_steps", None)
        if total is None and timesteps:
            total = len(timesteps)
        # A second-order scheduler counts steps that share a timestep.
        told = index if total == len(timesteps or ()) else None
        if index is not None and total is not None:
            return cls(name, index, total, None, index, _noise(context, told, timesteps))
        if timestep is None:
            raise RuntimeError(
                "neither a cache context nor a timestep tells the denoising step; call the "
                "transformer through its own forward with a timestep"
            )
        # This waits for the device. Wan 2.2 gives one timestep a token, 0 for the clean first
        # frame: the largest is the step's.
        value = float(timestep.max())
        if index is not None:
            return cls(name, index, total, value, index, _noise(context, told, timesteps))
        # Some pipelines cast the timestep to the dtype of the latents; others scale it to [0, 1],
        # which leaves its place among the scheduler's unknown: their first is 1, and 1 may be the
        # scheduler's last. A noise level that rises was made of timesteps on another scale.
        known = torch.tensor(timesteps or (), dtype=torch.float64).to(timestep.dtype).tolist()
        is_place = value in known and known[0] >= known[-1] and (value > 1 or known[0] <= 1)
        place = known.index(value) if is_place else None
        return cls(name, None, total, value, place, _noise(context, place, timesteps))


def _noise(context: Any, place: int | None, timesteps: tuple[float, ...] | None) -> float | None:
    if timesteps and timesteps[0] > 0 and place is not None and place < len(timesteps):
        return timesteps[place] / timesteps[0]
    # The sigma of flow matching is the noise level itself; other schedulers' exceed 1.
    sigma = getattr(context, "sigma", None)
    return float(sigma) if sigma is not None and 0 <= sigma <= 1 else None
