"""A text-to-image transformer of diffusers as a teacher, whose student is the same weights with LoRA."""

from functools import cached_property

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.networks import Network
from decm_lightning.teachers.diffusers_network import DiffusersNetwork
from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Captions, Condition


class DiffusersTeacher(Teacher):
    """A frozen transformer of diffusers; `student()` shares its weights and adds LoRA and an end time.

    The two are never out of step and cost the memory of one: what the student trains is its own, and the teacher has
    none of it. Captions are what the pipeline's `encode_prompt` gives, as `DiffusersPrompts` returns them.

    Args:
        network: the model, without adapters.
        rank: of the student's LoRA adapters, at least 1.
        targets: ends of the names of the projections to adapt; None for the attention's.
        max_tokens: tokens of the empty prompt, as of all captions; None for the pipeline's own.

    Raises:
        ValueError: if rank is below 1.
    """

    network: DiffusersNetwork

    def __init__(
        self, network: DiffusersNetwork, rank: int = 64, targets: list[str] | None = None, max_tokens: int | None = None
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1: got {rank}")
        super().__init__(network)
        self.rank = rank
        self.targets = targets
        self.prompts = DiffusersPrompts(network.config["model"], max_tokens, network.config["dtype"])

    @cached_property
    def empty(self) -> Captions:
        """The empty prompt, one row, by the pipeline's text encoders, which are loaded for it and let go."""
        return self.prompts.empty()

    def null(self, condition: Condition) -> Condition:
        """Return as many empty prompts as there are captions, as the pipeline encodes them for guidance.

        Raises:
            ValueError: if the model's folder has no text encoders, or captions are of another length or kind.
        """
        if condition is None:
            return None
        captions = self.network.checked(condition)
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
        return self.network.with_end_time(self.rank, self.targets).train()
