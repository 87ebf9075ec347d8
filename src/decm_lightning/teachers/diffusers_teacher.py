"""A transformer of diffusers as a teacher, whose student is the same weights with LoRA."""

from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.networks import Network
from decm_lightning.teachers.diffusers_network import DiffusersNetwork, Dtype
from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.teachers.noise_prediction import NoisePrediction
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Captions, Condition


class DiffusersTeacher(Teacher):
    """A frozen SD3, Flux, Sana, PixArt or DiT of diffusers; `student()` shares its weights, with LoRA and an end time.

    The family is recognized from the folder's config (`diffusers_families`). Teacher and student take the memory of one
    model. Captions are what the pipeline's `encode_prompt` gives, as `DiffusersPrompts` returns them. Samples are
    latents of the pipeline's VAE, normalized as the pipeline does: (z - shift_factor) scaling_factor, from its config.

    Example:
        >>> teacher = DiffusersTeacher("stabilityai/stable-diffusion-3.5-medium", lora_rank=64)

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        lora_rank: of the student's LoRA adapters, at least 1.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights, which teacher and student share.
        latent_size: height and width of the latents; None for the model's own, which for Flux is its pipeline's 128.
        max_tokens: tokens of the empty prompt, as of all captions; None for the pipeline's own.
        embedded_guidance: the guidance scale that a Flux embeds. One pass then gives the guided velocity, so that the
            distiller's guidance scale stays 1.
        noise: the schedule of a PixArt or DiT, which predicts noise, as in its pipeline's scheduler_config.json.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: if tensors of the model are missing or left over, it is of an unknown family, or lora_rank is below
            1.
    """

    network: DiffusersNetwork

    def __init__(
        self,
        model: str,
        lora_rank: int = 64,
        targets: list[str] | None = None,
        dtype: Dtype = "float32",
        latent_size: int | None = None,
        max_tokens: int | None = None,
        embedded_guidance: float = 3.5,
        noise: NoisePrediction = NoisePrediction(),  # noqa: B008 - frozen
    ) -> None:
        if lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1: got {lora_rank}")
        super().__init__(DiffusersNetwork(model, None, None, dtype, latent_size, embedded_guidance, noise))
        self.lora_rank = lora_rank
        self.targets = targets
        self.prompts = DiffusersPrompts(model, max_tokens, dtype)

    @cached_property
    def empty(self) -> Captions:
        """The empty prompt, one row, by the pipeline's text encoders, which are loaded for it and released."""
        return self.prompts.empty()

    def null(self, condition: Condition) -> Condition:
        """Return null classes, or as many empty prompts as there are captions, as the pipeline encodes them.

        Raises:
            ValueError: if the model embeds guidance, its folder has no text encoders, or captions are of another length
                or kind.
        """
        if self.network.embeds_guidance:
            raise ValueError(
                "this model has guidance embedded: leave the guidance scale at 1, and set embedded_guidance instead"
            )
        if condition is None:
            return None
        captions = self.network.checked(condition)
        if not isinstance(captions, Captions):
            return self.network.null(captions)
        rows, given = len(captions.tokens), captions.tokens.shape[1]
        # Moved once: each copy to a GPU waits for it.
        self.empty = _pytree.tree_map_only(Tensor, lambda part: part.to(captions.tokens.device), self.empty)
        if self.empty.tokens.shape[1] != given:
            has = self.empty.tokens.shape[1]
            raise ValueError(f"the empty prompt has {has} tokens and captions {given}: encode both with one max_tokens")
        if captions.mask is None and self.empty.mask is not None:
            raise ValueError("the empty prompt has a mask: captions must have one too")
        mask = None
        if captions.mask is not None:
            mask = torch.ones_like(captions.mask) if self.empty.mask is None else self.empty.mask.to(captions.mask)
        tokens, pooled = self.empty.tokens.to(captions.tokens), self.empty.pooled
        if captions.pooled is not None and pooled is not None:
            pooled = pooled.to(captions.pooled).expand(rows, -1)
        return Captions(tokens.expand(rows, -1, -1), mask if mask is None else mask.expand(rows, -1), pooled)

    def student(self) -> Network:
        """Return a trainable flow map that equals the teacher for every end time, and shares its weights."""
        return self.network.with_end_time(self.lora_rank, self.targets).train()

    def sharded(self) -> list[Network]:
        """Return none: a student with LoRA shares the weights, and other processes do not send them."""
        return []
