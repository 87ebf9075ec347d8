"""Stable Diffusion 3 and 3.5: a rectified flow from data at sigma = 0 to noise at 1, by a transformer over both."""

from typing import Any, ClassVar

from torch import Tensor

from decm_lightning.teachers.diffusers_network import DiffusersNetwork
from decm_lightning.teachers.diffusers_teacher import DiffusersTeacher
from decm_lightning.types import Captions, Condition, Sample, Time


class SD3(DiffusersNetwork):
    """diffusers' SD3Transformer2DModel (arXiv 2403.03206): sigma = 1 - t, given times 1000; it predicts noise - data.

    It has no mask: its pipeline lets it read the encoder's padding, too.
    """

    kind: ClassVar[str] = "SD3Transformer2DModel"

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, side, side)."""
        return -self.predict(x_t, 1000 * (1 - t), s, condition)

    def call(self, x: Tensor, time: Any, captions: Captions, s: Time | None) -> Tensor:
        """Return the predicted velocity from data to noise."""
        times = time if s is None else (time, s)
        return self.model(x, captions.tokens, captions.pooled, times).sample


class DiffusersSD3Teacher(DiffusersTeacher):
    """Stable Diffusion 3 or 3.5, such as stabilityai/stable-diffusion-3.5-medium; samples are latents of its VAE.

    Latents are normalised as its pipeline does: (z - shift_factor) scaling_factor, from the VAE's config.
    """

    network_class: ClassVar[type[DiffusersNetwork]] = SD3
