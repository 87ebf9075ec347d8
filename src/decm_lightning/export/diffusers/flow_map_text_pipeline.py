"""A pipeline that generates images from captions with a flow map in few steps."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decm_lightning.export.diffusers.bundle import source
from decm_lightning.export.diffusers.pipeline import FlowMapPipeline, with_options

SOURCE = source(__file__)


class FlowMapTextPipeline(FlowMapPipeline):
    """Generates images from captions in few steps, without guidance.

    Args:
        transformer: a `FlowMapTextDiT`.
        scheduler: FlowMapEulerDiscreteScheduler with shift 1.
        text_encoder: the encoder that the transformer was trained with; its last hidden state is used.
        tokenizer: its tokenizer.
        vae: the VAE of the latents; None if samples are images.
        max_tokens: number of tokens to which captions are truncated.
        steps: the default number of steps.
        sampling: the recommended sampler for each number of steps, such as {"2": "mix?s1=0.6"}; the sampler of the
            default number serves all others.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vae: ModelMixin | None = None,
        max_tokens: int = 128,
        steps: int = 2,
        sampling: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self.register_to_config(max_tokens=max_tokens)
        self._set_up(steps, sampling)

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens of captions, (b, n, d), and their mask, (b, n)."""
        inputs = self.tokenizer(
            [prompt] if isinstance(prompt, str) else list(prompt),
            padding=True,
            truncation=True,
            max_length=self.config.max_tokens,
            return_tensors="pt",
        ).to(self._execution_device)
        return self.text_encoder(**inputs).last_hidden_state, inputs["attention_mask"]

    @with_options
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images from captions.

        Args:
            prompt: a caption or several.
            num_inference_steps: evaluations of the transformer; None for the recommended number.
            sampler: "mix", "euler", "consistency" or "flow_map", with options as in "mix?s1=0.6"; None: recommended.
            prompt_embeds: tokens from `encode_prompt`, instead of captions.
            prompt_attention_mask: the mask of prompt_embeds.
            options: further arguments of `_generate`: num_images_per_prompt, generator, latents, output_type,
                return_dict, callback_on_step_end.
        """
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds")
        if prompt is not None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        condition = {"encoder_hidden_states": prompt_embeds, "encoder_attention_mask": prompt_attention_mask}
        return self._generate(condition, self.transformer.sample_shape, num_inference_steps, sampler, **options)
