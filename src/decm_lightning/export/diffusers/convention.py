"""The convention of diffusers: timesteps from 1000 for noise to 0 for data, and velocities from data to noise."""

from torch import Tensor

TIMESTEPS = 1000
"""The timestep of noise, `num_train_timesteps` of the schedulers."""


def times(samples: Tensor, *timesteps: Tensor) -> list[Tensor]:
    """Return timesteps as times t = 1 - timestep / 1000 in float32, one per sample."""
    return [(1 - timestep / TIMESTEPS).float().to(samples.device).expand(len(samples)) for timestep in timesteps]
