"""Flux: a rectified flow like SD3's, on latents in packs of 2 x 2, with embedded guidance instead of a second pass."""

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from decm_lightning.teachers.diffusers_network import DiffusersNetwork, Dtype, EndTime
from decm_lightning.teachers.diffusers_teacher import DiffusersTeacher
from decm_lightning.types import Captions, Condition, Sample, Time


class ExactTime(nn.Module):
    """Flux's time embedding with time and guidance taken beside the pooled caption.

    The model rounds both to the dtype of its activations before it multiplies them by 1000: in bfloat16 the derivative
    in t would be that of another point.

    Args:
        embedding: the model's own.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, *args: Any) -> Tensor:
        """Return the embedding, (b, width)."""
        pooled, *exact = args[-1]
        return self.embedding(*(1000 * value for value in exact if value is not None), pooled)


class FluxEndTime(EndTime):
    """Takes s beside the pooled caption, too."""

    def forward(self, *args: Any) -> Tensor:  # type: ignore[override]
        """Return the sum of both embeddings, (b, width)."""
        *beside, s = args[-1]
        return self.add(self.embedding(beside), s)


class Flux(DiffusersNetwork):
    """diffusers' FluxTransformer2DModel: sigma = 1 - t; it predicts noise - data.

    It has no mask: its pipeline lets it read the encoder's padding, too. Its config does not say how large latents are:
    128 x 128, as its pipeline has it, unless `side` is given.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        rank: of the LoRA adapters, which come with an end time; None for the model alone.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights. What is added is in float32.
        side: of the latents to draw, as sample_shape says; an even number.
        guidance: the guidance scale that is embedded, if the model embeds one.
        base: as in DiffusersNetwork.
    """

    kind: ClassVar[str] = "FluxTransformer2DModel"
    embedder_class: ClassVar[type[EndTime]] = FluxEndTime

    def __init__(
        self,
        model: str,
        rank: int | None = None,
        targets: list[str] | None = None,
        dtype: Dtype = "float32",
        side: int | None = None,
        guidance: float = 3.5,
        base: str | None = None,
    ) -> None:
        super().__init__(model, dtype=dtype, side=side, base=base)
        self.model.time_text_embed = ExactTime(self.model.time_text_embed)
        self.config |= {"guidance": guidance}
        self.sample_shape = (self.model.config.in_channels // 4, self.side, self.side)
        self.guidance = guidance
        if rank is not None:
            self.adapt(rank, targets)

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, in_channels / 4, side, side)."""
        return -self.predict(x_t, 1 - t, s, condition)

    def call(self, x: Tensor, time: Any, captions: Captions, s: Time | None) -> Tensor:
        """Return the predicted velocity from data to noise."""
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        scale = None
        if self.model.config.guidance_embeds:
            scale = torch.full((len(x),), self.guidance, dtype=torch.float32, device=x.device)
        places = [torch.arange(size, device=x.device) for size in (1, height, width)]
        predicted = self.model(
            rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
            captions.tokens,
            (captions.pooled, time, scale) if s is None else (captions.pooled, time, scale, s),
            time,
            img_ids=torch.cartesian_prod(*places),
            txt_ids=torch.zeros(captions.tokens.shape[1], 3, dtype=torch.long, device=x.device),
            guidance=scale,
        ).sample
        return rearrange(predicted, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


class DiffusersFluxTeacher(DiffusersTeacher):
    """Flux.1, such as black-forest-labs/FLUX.1-dev; samples are latents of its VAE.

    Flux.1-dev was distilled to be guided by an embedded scale: one pass gives the guided velocity, so the guidance of
    the distiller stays 1. Latents are normalized as its pipeline does: (z - shift_factor) scaling_factor.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        rank: of the student's LoRA adapters, at least 1.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights, which teacher and student share.
        side: of the latents to draw, an even number; None for the pipeline's 128.
        max_tokens: tokens of the empty prompt, as of all captions; None for the pipeline's own.
        guidance: the guidance scale to embed.

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
        guidance: float = 3.5,
    ) -> None:
        super().__init__(Flux(model, dtype=dtype, side=side, guidance=guidance), rank, targets, max_tokens)

    def null(self, condition: Condition) -> Condition:
        """Return the empty prompt, if the model embeds no guidance.

        Raises:
            ValueError: if it does.
        """
        if self.network.model.config.guidance_embeds:
            raise ValueError(
                "this Flux has guidance embedded: leave the guidance scale at 1, and set the teacher's own"
            )
        return super().null(condition)
