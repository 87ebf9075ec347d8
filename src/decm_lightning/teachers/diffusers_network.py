"""A text-to-image transformer of diffusers as a network of ours; each family says how it is called."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from decm_lightning.networks.diffusers_folder import from_pretrained
from decm_lightning.networks.embedding import TimeEmbedding
from decm_lightning.networks.lora import LoRANetwork
from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.text import CaptionEncoder
from decm_lightning.types import Captions, Condition, Sample, Time

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
SELF_AND_CROSS = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*SELF_AND_CROSS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The attention's projections, which diffusers' own LoRA training adapts; those of joint attention have the text's."""


class EndTime(nn.Module):
    """A time embedding of diffusers, and beside it that of the end time s: zero at first.

    s is embedded in [0, 1] as it is: times 1000, as diffusers embeds t, it would make the derivative in s large.
    Transformers hand the time they are given to their embedding as it is: here it is the pair (time, s).

    Args:
        embedding: the model's own, from a time and more to (b, width).
        width: of the embedding.
    """

    def __init__(self, embedding: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.end_time = TimeEmbedding(width, zero_output=True)

    def forward(self, times: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the sum of both embeddings, (b, width)."""
        time, s = times
        return self.add(self.embedding(time, *args, **kwargs), s)

    def add(self, embedded: Tensor, s: Time) -> Tensor:
        """Return an embedding with that of s added, in the dtype it has."""
        return embedded + self.end_time(s).to(embedded.dtype)


class DiffusersNetwork(LoRANetwork):
    """u(x_t, t, s, captions) by a transformer of diffusers, in our convention: t = 0 noise, velocity data minus noise.

    Without adapters it is the model as it was trained: its velocity, whatever s is. It reads captions as its pipeline
    encodes them: `DiffusersPrompts`.

    Args:
        model: a folder, or a name on the Hugging Face hub, of a pipeline or of its transformer alone.
        rank: of the LoRA adapters, which come with an end time; None for the model alone.
        targets: ends of the names of the projections to adapt; None for the attention's.
        dtype: of the pretrained weights. What is added is in float32.
        side: of the latents to draw, as sample_shape says; None for the model's own.
        base: with a rank, the hash of the pretrained weights that the adapters were trained on, which `adapt` writes
            into the config; None for any.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: if tensors of the model are missing or left over, it is of another family, or `base` is the hash of
            other weights.
    """

    time_scale = 1000.0
    kind: ClassVar[str]
    """The class in diffusers."""
    time_embedding: ClassVar[str] = "time_text_embed"
    """The name of the module that embeds the time."""
    embedder_class: ClassVar[type[EndTime]] = EndTime
    projections: ClassVar[Sequence[str]] = JOINT
    caption_key: ClassVar[str] = "joint_attention_dim"
    """The entry of the model's config that is the width of a caption's token."""

    def __init__(
        self,
        model: str,
        rank: int | None = None,
        targets: Sequence[str] | None = None,
        dtype: Dtype = "float32",
        side: int | None = None,
        base: str | None = None,
    ) -> None:
        # A transformer may drop labels or tokens by itself in training mode.
        super().__init__(read(self.kind, model, dtype).eval(), self.projections)
        self.config = {"model": model, "rank": None, "targets": None, "dtype": dtype, "side": side, "base": base}
        self.num_classes = 0
        settings = self.model.config
        self.side = side or getattr(settings, "sample_size", None) or 128
        self.sample_shape = (settings.in_channels, self.side, self.side)
        self.caption_width: int = settings[self.caption_key]
        self.pooled_width: int | None = settings.get("pooled_projection_dim")
        if rank is not None:
            self.adapt(rank, targets)

    @abstractmethod
    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), shaped like x_t.

        Raises:
            ValueError: if the condition is none of captions for this model.
        """

    @abstractmethod
    def call(self, x: Tensor, time: Any, captions: Captions, s: Time | None) -> Tensor:
        """Return what the model predicts, with the times given to it as it takes them; s is None if it reads none."""

    def predict(self, x: Sample, time: Time, s: Time, condition: Condition) -> Sample:
        """Return what the model predicts at its own time, in the dtype of x, without a predicted variance."""
        captions = self.checked(condition)
        dtype = next(self.model.parameters()).dtype
        pooled = None if captions.pooled is None else captions.pooled.to(dtype)
        captions = captions._replace(tokens=captions.tokens.to(dtype), pooled=pooled)
        predicted = self.call(x.to(dtype), time, captions, s if self.added else None)
        return predicted[:, : x.shape[1]].to(x.dtype)

    def checked(self, condition: Condition) -> Captions:
        """Return the condition, if it is one for this model.

        Raises:
            ValueError: if it is not.
        """
        name = type(self).__name__
        if not isinstance(condition, Captions):
            given = "None" if condition is None else f"labels {tuple(condition.shape)}"
            raise ValueError(f"{name} needs Captions, and teacher.null(captions) for unconditional rows: got {given}")
        if condition.tokens.shape[-1] != self.caption_width:
            shape = tuple(condition.tokens.shape)
            raise ValueError(f"captions of {name} must be (b, n, {self.caption_width}): got {shape}, another encoder's")
        pooled = None if condition.pooled is None else condition.pooled.shape[-1]
        if self.pooled_width not in (None, pooled):
            raise ValueError(f"captions of {name} need a pooled vector (b, {self.pooled_width}): got width {pooled}")
        return condition

    def add_end_time(self) -> None:
        """Put a `EndTime` around the model's time embedding."""
        settings = self.model.config
        width = settings.num_attention_heads * settings.attention_head_dim
        embedding = self.model.get_submodule(self.time_embedding)
        embedder = self.embedder_class(embedding, width).to(next(embedding.parameters()).device)
        self.model.set_submodule(self.time_embedding, embedder)

    def caption_encoder(self) -> CaptionEncoder:
        """Return the text encoders of the model's own pipeline."""
        return DiffusersPrompts(self.config["model"], device=next(self.parameters()).device)

    def units(self) -> list[nn.Module]:
        """Return the blocks."""
        return [*self.model.transformer_blocks, *getattr(self.model, "single_transformer_blocks", ())]

    def example(self, rows: int = 2) -> tuple[Sample, Time, Time, Condition]:
        """Return arguments that this network takes: zeros of the right shapes."""
        x_t = next(self.model.parameters()).new_zeros(rows, *self.sample_shape)
        times = torch.full((rows,), 0.5, device=x_t.device)
        pooled = x_t.new_zeros(rows, self.pooled_width) if self.pooled_width else None
        return x_t, times, times, Captions(x_t.new_zeros(rows, 2, self.caption_width), None, pooled)

    def null(self, condition: Condition) -> Condition:
        """Refuse: the empty prompt is known to the teacher, which has the text encoders.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__} cannot encode the empty prompt: use teacher.null(captions)")

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the model keeps only the inputs of each block for the backward pass."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        self.model.enable_gradient_checkpointing() if wanted else self.model.disable_gradient_checkpointing()


def read(kind: str, path: str, dtype: Dtype = "float32") -> nn.Module:
    """Return a transformer of diffusers from a folder or the hub, alone or in a pipeline.

    Args:
        kind: its class in diffusers.
        path: the folder or name.
        dtype: of its weights.

    Raises:
        OSError: if there is no such folder or name.
        ValueError: if it is of another class, a file cannot be read, or tensors are missing or left over.
    """
    # Imported here: nothing else in the method needs diffusers, and it takes seconds.
    import diffusers

    cls = getattr(diffusers, kind)
    subfolder = None if (Path(path) / "config.json").is_file() else "transformer"
    found = cls.load_config(path, subfolder=subfolder).get("_class_name", kind)
    if found != kind:
        raise ValueError(f"{path} holds a {found}: this teacher takes a {kind}")
    return from_pretrained(cls, path, subfolder, torch_dtype=getattr(torch, dtype))
