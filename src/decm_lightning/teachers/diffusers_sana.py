"""Sana: a rectified flow like SD3's, with linear attention on the latents of a deep-compression autoencoder."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from decm_lightning.teachers.diffusers_network import SELF_AND_CROSS, DiffusersNetwork, Dtype
from decm_lightning.teachers.diffusers_teacher import DiffusersTeacher
from decm_lightning.types import Captions, Condition, Sample, Time


class Sana(DiffusersNetwork):
    """diffusers' SanaTransformer2DModel (arXiv 2410.10629): sigma = 1 - t, given times 1000 and its timestep_scale.

    It predicts noise - data, and leaves out the tokens that the captions' mask does. SANA-Sprint, which embeds
    guidance, is another model: few-step already, and on a TrigFlow's clock.
    """

    kind: ClassVar[str] = "SanaTransformer2DModel"
    time_embedding: ClassVar[str] = "time_embed.emb"
    projections: ClassVar[Sequence[str]] = SELF_AND_CROSS
    caption_key: ClassVar[str] = "caption_channels"

    def __init__(
        self,
        model: str,
        rank: int | None = None,
        targets: Sequence[str] | None = None,
        dtype: Dtype = "float32",
        side: int | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__(model, rank, targets, dtype, side, base)
        if self.model.config.guidance_embeds:
            raise ValueError(f"{model} is a SANA-Sprint, a few-step student on another clock: give a Sana")

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, side, side)."""
        return -self.predict(x_t, 1000 * self.model.config.timestep_scale * (1 - t), s, condition)

    def call(self, x: Tensor, time: Any, captions: Captions, s: Time | None) -> Tensor:
        """Return the predicted velocity from data to noise."""
        times = time if s is None else (time, s)
        return self.model(x, captions.tokens, times, encoder_attention_mask=captions.mask).sample


class DiffusersSanaTeacher(DiffusersTeacher):
    """Sana, such as Efficient-Large-Model/Sana_1600M_512px_diffusers; samples are latents of its autoencoder.

    Latents are normalized as its pipeline does: times the scaling_factor of the autoencoder's config.

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
        super().__init__(Sana(model, dtype=dtype, side=side), rank, targets, max_tokens)
