"""PixArt-Alpha and -Sigma: DDPM's noise predicted from captions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from decm_lightning.teachers.diffusers_network import SELF_AND_CROSS, DiffusersNetwork, Dtype
from decm_lightning.teachers.diffusers_noise import NoisePrediction
from decm_lightning.teachers.diffusers_teacher import DiffusersTeacher
from decm_lightning.types import Captions, Condition, Sample, Time

PIXELS = 8
"""Pixels along the side of one latent of its VAE."""


class PixArt(DiffusersNetwork):
    """diffusers' PixArtTransformer2DModel (arXiv 2310.00426): `NoisePrediction` makes its noise a velocity.

    It leaves out the tokens that the captions' mask does. Where data are divided by a small a, near t = 0, an error of
    the noise is multiplied by up to 158, at t = 0 itself too: the noise edge is harder to learn than with a velocity.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        rank: of the LoRA adapters, which come with an end time; None for the model alone.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights. What is added is in float32.
        side: of the latents to draw, as sample_shape says; None for the model's own.
        beta_start: the first beta, in (0, 1), as in the pipeline's scheduler_config.json.
        beta_end: the last beta, in (0, 1).
        steps: how many there are, at least 2.
    """

    kind: ClassVar[str] = "PixArtTransformer2DModel"
    time_embedding: ClassVar[str] = "adaln_single.emb"
    projections: ClassVar[Sequence[str]] = SELF_AND_CROSS
    caption_key: ClassVar[str] = "caption_channels"

    def __init__(
        self,
        model: str,
        rank: int | None = None,
        targets: Sequence[str] | None = None,
        dtype: Dtype = "float32",
        side: int | None = None,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        steps: int = 1000,
        base: str | None = None,
    ) -> None:
        super().__init__(model, rank, targets, dtype, side, base)
        self.config |= {"beta_start": beta_start, "beta_end": beta_end, "steps": steps}
        self.noise = NoisePrediction(beta_start, beta_end, steps)

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels, side, side)."""
        return self.noise.velocity(lambda z, step: self.predict(z, step, s, condition), x_t, t)

    def call(self, x: Tensor, time: Any, captions: Captions, s: Time | None) -> Tensor:
        """Return the predicted noise, and the predicted variance if the model has one."""
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            height, width = x.shape[-2:]

            def column(value: float) -> Tensor:
                return torch.full((len(x), 1), value, dtype=x.dtype, device=x.device)

            sizes["resolution"] = torch.cat([column(PIXELS * height), column(PIXELS * width)], 1)
            sizes["aspect_ratio"] = column(height / width)
        times = time if s is None else (time, s)
        return self.model(
            x, captions.tokens, times, added_cond_kwargs=sizes, encoder_attention_mask=captions.mask
        ).sample


class DiffusersPixArtTeacher(DiffusersTeacher):
    """PixArt-Alpha or -Sigma, such as PixArt-alpha/PixArt-Sigma-XL-2-512-MS; samples are latents of its VAE.

    Latents are normalized as its pipeline does: times the scaling_factor of the VAE's config.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        rank: of the student's LoRA adapters, at least 1.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights, which teacher and student share.
        side: of the latents to draw; None for the model's own.
        max_tokens: tokens of the empty prompt, as of all captions; None for the pipeline's own.
        beta_start: the first beta, in (0, 1), as in the pipeline's scheduler_config.json.
        beta_end: the last beta, in (0, 1).
        steps: how many there are, at least 2.

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
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        steps: int = 1000,
    ) -> None:
        network = PixArt(model, None, None, dtype, side, beta_start, beta_end, steps)
        super().__init__(network, rank, targets, max_tokens)
