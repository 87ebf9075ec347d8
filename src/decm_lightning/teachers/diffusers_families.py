"""The families of diffusers' transformers, one row each: what differs between them, and nothing else knows them.

To add a family:

1. Write a function such as `_sd3` that calls the model on (x, times, condition) and returns its prediction. Pass
   `times`, the pair (time, s), where the model takes a time: it must reach the model's time embedding unchanged.
2. Add a row to `FAMILIES` under the transformer's class name: this function, the time that the model takes at our t,
   the sign of its velocity (or that it predicts noise), the modules that embed its time, to which the embedding of s is
   added, the attention's projections for LoRA, and what its condition carries.
3. For captions, say where the parts of captions are in what the pipeline's `encode_prompt` returns.
4. Add a tiny model and one step of the pipeline's sampler to tests/teachers/test_diffusers_families.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from decm_lightning.networks.embedding import TimeEmbedding
from decm_lightning.types import Captions, Labels, Time

Times: TypeAlias = tuple[Time, Time]
"""The model's own time, and the end time s in [0, 1]."""
SELF_AND_CROSS = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SELF_AND_CROSS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The attention's projections, which diffusers' own LoRA training adapts; joint attention also has the text's."""
PIXELS = 8
"""Pixels along the side of one latent of PixArt's VAE."""


class TimeInput(nn.Module):
    """A time embedding of diffusers that takes the pair (time, s), and adds the embedding of s once there is one.

    s is embedded as it is, in [0, 1]: times 1000, as diffusers embeds t, its derivative would be large.

    Args:
        embedding: the model's own, from a time and more to (b, width).
        width: of the embedding.
        guidance: the guidance scale, for families that embed one.
    """

    def __init__(self, embedding: nn.Module, width: int, guidance: float | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.width = width
        self.guidance = guidance
        self.end_time: TimeEmbedding | None = None

    def add_end_time(self) -> None:
        """Add an embedding of s that is zero at first."""
        device = next(self.embedding.parameters()).device
        self.end_time = TimeEmbedding(self.width, zero_output=True).to(device)

    def forward(self, times: Times, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embedding, (b, width), in the model's dtype."""
        time, s = times
        embedded = self.embedding(time, *args, **kwargs)
        return embedded if self.end_time is None else embedded + self.end_time(s).to(embedded.dtype)


class FluxTimeInput(TimeInput):
    """Flux's: the times come with the pooled caption.

    Flux rounds its time and guidance to the dtype of its activations before it multiplies them by 1000: in bfloat16 the
    derivative in t would be that of another point.
    """

    def forward(self, *args: Any) -> Tensor:  # type: ignore[override]
        """Return the embedding, (b, width), from arguments of which the last is (pooled, times)."""
        pooled, (time, s) = args[-1]
        if self.guidance is None:
            return super().forward((1000 * time, s), pooled)
        scale = torch.full((len(time),), 1000 * self.guidance, dtype=torch.float32, device=time.device)
        return super().forward((1000 * time, s), scale, pooled)


class PromptOutputs(NamedTuple):
    """The positions of the parts of captions in the output of a pipeline's `encode_prompt`."""

    tokens: int
    mask: int | None = None
    pooled: int | None = None


PROMPT, EMPTY = PromptOutputs(tokens=0, mask=1), PromptOutputs(tokens=2, mask=3)
"""Those of Sana and PixArt."""


def _thousandfold(_: Any, t: Time) -> Time:
    return 1000 * (1 - t)


@dataclass(frozen=True)
class Family:
    """What distinguishes a family of transformers.

    Attributes:
        call: the prediction of a model for (model, x, times, condition); channels beyond those of x are dropped.
        time: the model's time for (config, t); unused if it predicts noise, whose steps `NoisePrediction` gives.
        sign: of its velocity in our convention: -1 if it predicts noise - data.
        predicts_noise: it predicts DDPM's noise.
        time_input: takes the times to the model's time embedding.
        embedding: the names of the modules that embed the time; "*" is the number of a block.
        targets: ends of the names of the projections that LoRA adapts.
        caption_width: the entry of the model's config that is the width of a caption's token; None for class labels.
        packing: the side of the square of latents that the model takes as one token of packed channels.
        embeds_guidance: a model of this family may embed a guidance scale.
        pipeline: the beginning of the names of its pipelines' classes.
        prompt: where its prompts are in what `encode_prompt` returns.
        empty: where the empty prompt of guidance is; None if it is encoded as any other.
    """

    call: Callable[[Any, Tensor, Times, Any], Tensor]
    embedding: str
    time: Callable[[Any, Time], Time] = _thousandfold
    sign: int = -1
    predicts_noise: bool = False
    time_input: type[TimeInput] = TimeInput
    targets: Sequence[str] = SELF_AND_CROSS
    caption_width: str | None = "caption_channels"
    packing: int = 1
    embeds_guidance: bool = False
    pipeline: str | None = None
    prompt: PromptOutputs = PROMPT
    empty: PromptOutputs | None = EMPTY


def _sd3(model: Any, x: Tensor, times: Times, captions: Captions) -> Tensor:
    # No mask: the pipeline lets the model read the encoder's padding, too.
    return model(x, captions.tokens, captions.pooled, times).sample


def _flux(model: Any, x: Tensor, times: Times, captions: Captions) -> Tensor:
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    positions = [torch.arange(size, device=x.device) for size in (1, height, width)]
    predicted = model(
        rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        captions.tokens,
        (captions.pooled, times),
        times[0],
        img_ids=torch.cartesian_prod(*positions),
        txt_ids=torch.zeros(captions.tokens.shape[1], 3, dtype=torch.long, device=x.device),
    ).sample
    return rearrange(predicted, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def _sana(model: Any, x: Tensor, times: Times, captions: Captions) -> Tensor:
    return model(x, captions.tokens, times, encoder_attention_mask=captions.mask).sample


def _pixart(model: Any, x: Tensor, times: Times, captions: Captions) -> Tensor:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        height, width = x.shape[-2:]
        sizes["resolution"] = x.new_tensor([[PIXELS * height, PIXELS * width]]).expand(len(x), -1)
        sizes["aspect_ratio"] = x.new_tensor([[height / width]]).expand(len(x), -1)
    return model(x, captions.tokens, times, added_cond_kwargs=sizes, encoder_attention_mask=captions.mask).sample


def _dit(model: Any, x: Tensor, times: Times, labels: Labels) -> Tensor:
    return model(x, timestep=times, class_labels=labels).sample


FAMILIES = {
    # Stable Diffusion 3 and 3.5 (arXiv 2403.03206): sigma = 1 - t.
    "SD3Transformer2DModel": Family(
        _sd3,
        embedding="time_text_embed",
        targets=JOINT,
        caption_width="joint_attention_dim",
        pipeline="StableDiffusion3",
        prompt=PromptOutputs(tokens=0, pooled=2),
        empty=PromptOutputs(tokens=1, pooled=3),
    ),
    # Flux.1: a rectified flow like SD3's on packs of 2 x 2 latents. An embedded scale replaces guidance's second pass.
    "FluxTransformer2DModel": Family(
        _flux,
        embedding="time_text_embed",
        time=lambda _, t: 1 - t,
        time_input=FluxTimeInput,
        targets=JOINT,
        caption_width="joint_attention_dim",
        packing=2,
        embeds_guidance=True,
        pipeline="Flux",
        prompt=PromptOutputs(tokens=0, pooled=1),
        empty=None,
    ),
    # Sana (arXiv 2410.10629): a rectified flow on the latents of a deep-compression autoencoder.
    "SanaTransformer2DModel": Family(
        _sana,
        embedding="time_embed.emb",
        time=lambda config, t: 1000 * config.timestep_scale * (1 - t),
        pipeline="Sana",
    ),
    # PixArt-Alpha and -Sigma (arXiv 2310.00426). Near t = 0 their predicted data are divided by a small a, which
    # multiplies an error of the noise by up to 158: the noise edge is harder to learn than with a velocity.
    "PixArtTransformer2DModel": Family(_pixart, embedding="adaln_single.emb", predicts_noise=True, pipeline="PixArt"),
    # DiT (arXiv 2212.09748): by class. Each block has a time embedding of its own.
    "DiTTransformer2DModel": Family(
        _dit, embedding="transformer_blocks.*.norm1.emb", predicts_noise=True, caption_width=None
    ),
}
"""By the class of the transformer in diffusers."""
