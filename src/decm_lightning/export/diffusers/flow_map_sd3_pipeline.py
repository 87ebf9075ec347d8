"""A pipeline that generates images with a few-step student of Stable Diffusion 3."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ImagePipelineOutput, ModelMixin, SchedulerMixin, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from decm_lightning.export.diffusers.bundle import source
from decm_lightning.export.diffusers.pipeline import FlowMapPipeline, with_options

SOURCE = source(__file__)


class FlowMapSD3Pipeline(FlowMapPipeline):
    """Generates images from captions in few steps, without guidance.

    Args:
        transformer: a `FlowMapSD3`.
        scheduler: FlowMapEulerDiscreteScheduler with shift 1.
        vae, text_encoder, text_encoder_2, text_encoder_3, tokenizer, tokenizer_2, tokenizer_3: as in
            StableDiffusion3Pipeline.
        steps: the default number of steps.
        sampling: the recommended sampler for each number of steps, such as {"2": "mix?s1=0.6"}; the sampler of the
            default number serves all others.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder_3", "tokenizer_3"]
    _get_clip_prompt_embeds = StableDiffusion3Pipeline._get_clip_prompt_embeds
    _get_t5_prompt_embeds = StableDiffusion3Pipeline._get_t5_prompt_embeds
    encode_prompt = StableDiffusion3Pipeline.encode_prompt

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        steps: int = 2,
        sampling: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.tokenizer_max_length = tokenizer.model_max_length
        self._set_up(steps, sampling)

    @with_options
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 256,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images from captions.

        Args:
            prompt: a caption or several.
            num_inference_steps: evaluations of the transformer; None for the recommended number.
            sampler: "mix", "euler", "consistency" or "flow_map", with options as in "mix?s1=0.6"; None: recommended.
            height: height of the images in pixels; None for that of training.
            width: width of the images in pixels; None for that of training.
            max_sequence_length: number of T5 tokens to which captions are padded or truncated.
            prompt_embeds: tokens from `encode_prompt`, instead of captions.
            pooled_prompt_embeds: the vectors that belong to prompt_embeds.
            options: further arguments of `_generate`: num_images_per_prompt, generator, latents, output_type,
                return_dict, callback_on_step_end.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds")
        if prompt is not None:
            prompt_embeds, _, pooled_prompt_embeds, _ = self.encode_prompt(
                prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
            )
        channels, *trained = self.transformer.sample_shape
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        multiple = factor * self.transformer.config.patch_size
        if wrong := [side for side in (height, width) if side and side % multiple]:
            raise ValueError(f"height and width must be multiples of {multiple}: got {wrong[0]}")
        sides = [side // factor if side else own for side, own in zip((height, width), trained, strict=True)]
        condition = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled_prompt_embeds}
        return self._generate(condition, (channels, *sides), num_inference_steps, sampler, **options)
