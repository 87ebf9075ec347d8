"""A diffusers transformer as a teacher; the student shares its weights and adds LoRA."""

from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.errors import check_at_least
from decm_lightning.networks import Network
from decm_lightning.teachers.diffusers_network import DiffusersNetwork, Dtype
from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.teachers.noise_prediction import NoisePrediction
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Captions, Condition


class DiffusersTeacher(Teacher):
    """A frozen SD3, Flux, Sana, PixArt or DiT of diffusers; `student()` shares its weights, with LoRA and an end time.

    The family is read from the config of the model (`diffusers_families`). Teacher and student together take the memory
    of one model. Captions are the output of the pipeline's `encode_prompt`, as returned by `DiffusersPrompts`. Samples
    are latents of the pipeline's VAE with the pipeline's normalization (z - shift_factor) scaling_factor.

    Example:
        >>> teacher = DiffusersTeacher("stabilityai/stable-diffusion-3.5-medium", lora_rank=64)  # doctest: +SKIP

    Args:
        model: folder, or name on the Hugging Face hub, of a pipeline or of its transformer.
        lora_rank: rank of the student's LoRA adapters, at least 1.
        targets: projections to adapt, as suffixes of their names; None for those of the attention.
        dtype: dtype of the pretrained weights, which teacher and student share.
        latent_size: height and width of the latents; None for the size in the config of the model, or 128 for Flux.
        max_tokens: tokens of the empty prompt, which all captions must have too; None for the pipeline's default.
        embedded_guidance: the guidance scale that a Flux embeds. A single pass then returns the guided velocity, so the
            guidance scale of the distiller stays 1.
        noise: the schedule of a PixArt or DiT, which predict noise, as in the scheduler_config.json of its pipeline.

    Raises:
        OSError: if the folder or hub name does not exist.
        ValueError: if tensors of the model are missing or unexpected, its family is unknown, or lora_rank is below 1.
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
        check_at_least(1, lora_rank=lora_rank)
        super().__init__(DiffusersNetwork(model, None, None, dtype, latent_size, embedded_guidance, noise))
        self.name = model
        self.lora_rank = lora_rank
        self.targets = targets
        self.prompts = DiffusersPrompts(model, max_tokens, dtype)

    @cached_property
    def empty(self) -> Captions:
        """The encoded empty prompt, one row. The text encoders are loaded for it and released afterwards."""
        return self.prompts.empty()

    def null(self, condition: Condition) -> Condition:
        """Return a null class for each label, or an empty prompt for each caption.

        Raises:
            ValueError: if the model embeds guidance, its folder has no text encoders, or the captions differ from the
                empty prompt in length or in having a mask.
        """
        if self.network.embeds_guidance:
            raise ValueError(
                "the model embeds guidance: leave the guidance scale at 1, and set embedded_guidance instead"
            )
        if condition is None:
            return None
        captions = self.network.checked(condition)
        if not isinstance(captions, Captions):
            return self.network.null(captions)
        rows, length = len(captions.tokens), captions.tokens.shape[1]
        # Moved once: every copy to a GPU synchronizes with it.
        self.empty = _pytree.tree_map_only(Tensor, lambda part: part.to(captions.tokens.device), self.empty)
        if self.empty.tokens.shape[1] != length:
            found = f"got {self.empty.tokens.shape[1]} and {length}, set the same max_tokens for both"
            raise ValueError(f"the empty prompt and the captions must have the same number of tokens: {found}")
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
        """Return a trainable flow map that initially equals the teacher for every end time and shares its weights."""
        return self.network.with_end_time(self.lora_rank, self.targets).train()

    def sharded(self) -> list[Network]:
        """Return no networks: a student with LoRA shares the weights, which therefore stay whole in each process."""
        return []
