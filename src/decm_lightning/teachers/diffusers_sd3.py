"""Stable Diffusion 3 and 3.5: a rectified flow from data at sigma = 0 to noise at 1, by a transformer over both."""

from typing import Any, ClassVar

from torch import Tensor

from decm_lightning.teachers.diffusers_network import DiffusersNetwork, Dtype
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

    Latents are normalized as its pipeline does: (z - shift_factor) scaling_factor, from the VAE's config.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        rank: of the student's LoRA adapters, at least 1.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights, which teacher and student share.
        side: of the latents to draw; None for the model's own.
        max_tokens: tokens of the empty prompt, as of all captions; None for the pipeline's own.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: if tensors of the model are missing or left over, or it is of another family.
    """

    def __init__(
        self,
        model: str,
        rank: int = 64,
        targets: list[str] | None = None,
        dtype: Dtype = "float32",
        side: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(SD3(model, dtype=dtype, side=side), rank, targets, max_tokens)
