"""The supported families of diffusers transformers. All differences between families are in this module.

To add a family:

1. Write a function such as `_sd3` that calls the model on (x, times, condition) and returns its prediction. Pass the
   pair `times` = (time, s) in place of the time: it must reach the time embedding of the model unchanged.
2. Add an entry to `FAMILIES` under the class name of the transformer; the attributes of `Family` describe its fields.
3. For captions, set the positions of their parts in the output of the pipeline's `encode_prompt`.
4. Add a tiny model and one step of the pipeline's sampler to tests/teachers/test_diffusers_families.py.
5. Add its pipeline to tests/export/test_lora.py, unless it predicts noise: LoRA files change the bias of
   `timestep_embedder.linear_2` in `embedding`.
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
"""The time in the convention of the model, and the end time s in [0, 1]."""
SELF_AND_CROSS = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SELF_AND_CROSS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The attention projections that the LoRA training of diffusers adapts; joint attention adds those of the text."""
PIXELS = 8
"""The downsampling factor of PixArt's VAE."""


class TimeInput(nn.Module):
    """A diffusers time embedding that accepts the pair (time, s), and adds an embedding of s after `add_end_time`.

    s is embedded in [0, 1]. Multiplying it by 1000, as diffusers does with t, would make the derivative large. The
    output of the embedding is (b, width). Some families embed a guidance scale, too.
    """

    def __init__(self, embedding: nn.Module, width: int, guidance: float | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.width = width
        self.guidance = guidance
        self.end_time: TimeEmbedding | None = None

    def add_end_time(self) -> None:
        """Add an embedding of s that is initially zero."""
        device = next(self.embedding.parameters()).device
        self.end_time = TimeEmbedding(self.width, zero_output=True).to(device)

    def forward(self, times: Times, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embedding, (b, width), in the model's dtype."""
        time, s = times
        embedded = self.embedding(time, *args, **kwargs)
        return embedded if self.end_time is None else embedded + self.end_time(s).to(embedded.dtype)


class FluxTimeInput(TimeInput):
    """The time embedding of Flux, which receives the times together with the pooled caption.

    Flux rounds time and guidance to the dtype of its activations before it multiplies them by 1000. In bfloat16, the
    derivative in t would then be evaluated at a different point, so this class multiplies first.
    """

    def forward(self, *args: Any) -> Tensor:  # type: ignore[override]
        """Return the embedding, (b, width); the last argument is (pooled, times)."""
        pooled, (time, s) = args[-1]
        if self.guidance is None:
            return super().forward((1000 * time, s), pooled)
        scale = torch.full((len(time),), 1000 * self.guidance, dtype=torch.float32, device=time.device)
        return super().forward((1000 * time, s), scale, pooled)


class PromptOutputs(NamedTuple):
    """Positions of tokens, mask and pooled vector in the output of a pipeline's `encode_prompt`."""

    tokens: int
    mask: int | None = None
    pooled: int | None = None


PROMPT, EMPTY = PromptOutputs(tokens=0, mask=1), PromptOutputs(tokens=2, mask=3)
"""The positions in Sana and PixArt."""


def _thousandfold(_: Any, t: Time) -> Time:
    return 1000 * (1 - t)


@dataclass(frozen=True)
class Family:
    """The properties of a family of transformers.

    Attributes:
        call: maps (model, x, times, condition) to the prediction; channels beyond those of x are dropped.
        time: maps (config, t) to the time of the model. Noise predictions use the steps of `NoisePrediction` instead.
        sign: factor that converts its velocity to our convention: -1 if it predicts noise - data.
        predicts_noise: whether it predicts the noise of DDPM.
        time_input: the class that passes the times to the time embedding.
        embedding: name pattern of the modules that embed the time; "*" stands for a block number.
        targets: the projections that LoRA adapts, as suffixes of their names.
        caption_width: config key of the size of a caption token; None for class labels.
        packing: side of the square of latents that the model packs into one token.
        embeds_guidance: whether models of this family may embed a guidance scale.
        pipeline: prefix of the class names of its pipelines.
        prompt: positions of the prompts in the output of `encode_prompt`.
        empty: positions of the empty prompt of guidance; None if it is encoded like any prompt.
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
    # No mask: in the pipeline, the model also reads the padding of the encoder.
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
    # Flux.1: a rectified flow like SD3 on packs of 2 x 2 latents. An embedded scale replaces the second guidance pass.
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
    # PixArt-Alpha and -Sigma (arXiv 2310.00426). Near t = 0 the predicted data are divided by a small a, which
    # amplifies errors of the noise by up to 158: times near noise are harder to learn than with a velocity.
    "PixArtTransformer2DModel": Family(_pixart, embedding="adaln_single.emb", predicts_noise=True, pipeline="PixArt"),
    # DiT (arXiv 2212.09748), class-conditional. Each block has its own time embedding.
    "DiTTransformer2DModel": Family(
        _dit, embedding="transformer_blocks.*.norm1.emb", predicts_noise=True, caption_width=None
    ),
}
"""The families by the class name of the transformer in diffusers."""
