"""A diffusers transformer as a network u(x_t, t, s, condition) of this package, with LoRA and an end time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from decm_lightning.networks.diffusers_folder import find_config, from_pretrained
from decm_lightning.networks.lora import LoRANetwork
from decm_lightning.samplers.options import read_options
from decm_lightning.teachers.diffusers_families import FAMILIES, TimeInput, Times
from decm_lightning.teachers.diffusers_prompts import DiffusersPrompts
from decm_lightning.teachers.noise_prediction import NoisePrediction
from decm_lightning.text import CaptionEncoder
from decm_lightning.types import Captions, Condition, Sample, Time

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


class DiffusersNetwork(LoRANetwork):
    """A transformer u(x_t, t, s, condition) of one of the `FAMILIES`, in the convention of `path`.

    Without adapters, u is the velocity of the pretrained model for every s. The condition is class labels, or captions
    as encoded by the pipeline (`DiffusersPrompts`).

    Args:
        lora_rank: rank of the LoRA adapters, which are added together with an end time; None for the model alone.
        base: hash of the pretrained weights that the adapters were trained on, checked if lora_rank is set; None for
            any weights. `adapt` writes it into the config.

    The other arguments are those of `DiffusersTeacher`. Adapters and end time are in float32, whatever `dtype` is.

    Raises:
        OSError: if the folder or hub name does not exist.
        ValueError: if tensors of the model are missing or unexpected, its family is unknown, or `base` is the hash of
            other weights.
    """

    time_scale = 1000.0

    def __init__(
        self,
        model: str,
        lora_rank: int | None = None,
        targets: Sequence[str] | None = None,
        dtype: Dtype = "float32",
        latent_size: int | None = None,
        embedded_guidance: float = 3.5,
        noise: NoisePrediction | Mapping[str, Any] = NoisePrediction(),  # noqa: B008 - frozen
        base: str | None = None,
    ) -> None:
        transformer, kind = read(model, dtype)
        self.kind, self.family = kind, FAMILIES[kind]
        super().__init__(transformer, self.family.targets)
        settings: Any = self.model.config
        self.noise = noise if isinstance(noise, NoisePrediction) else NoisePrediction(**noise)
        self.config = {"model": model, "lora_rank": None, "targets": None, "dtype": dtype, "latent_size": latent_size}
        self.config |= {"embedded_guidance": embedded_guidance, "noise": asdict(self.noise), "base": base}
        self.embeds_guidance = bool(settings.get("guidance_embeds"))
        if self.embeds_guidance and not self.family.embeds_guidance:
            raise ValueError(
                f"{model} embeds guidance, so it is a SANA-Sprint, which is already a few-step student: use a Sana"
            )
        size = latent_size or settings.get("sample_size") or 128
        self.sample_shape = (settings.in_channels // self.family.packing**2, size, size)
        self.caption_width: int | None = settings[self.family.caption_width] if self.family.caption_width else None
        self.pooled_width: int | None = settings.get("pooled_projection_dim")
        self.num_classes = 0 if self.family.caption_width else settings.num_embeds_ada_norm
        width = settings.num_attention_heads * settings.attention_head_dim
        for name, module in list(self.model.named_modules()):
            if fnmatch(name, self.family.embedding):
                scale = embedded_guidance if self.embeds_guidance else None
                self.model.set_submodule(name, self.family.time_input(module, width, scale))
            if hasattr(module, "dropout_prob"):
                # In training mode, DiT would randomly drop labels.
                module.dropout_prob = 0.0
        if lora_rank is not None:
            self.adapt(lora_rank, targets)

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), shaped like x_t."""
        condition = self.checked(condition)
        if self.family.predicts_noise:
            return self.noise.velocity(lambda z, step: self._predict(z, (step, s), condition), x_t, t)
        time = self.family.time(self.model.config, t)
        return self.family.sign * self._predict(x_t, (time, s), condition)

    def checked(self, condition: Condition) -> Any:
        """Return the condition after checking that it matches the model."""
        if self.caption_width is None:
            if not isinstance(condition, Tensor):
                raise ValueError(f"{self.kind} needs class labels: use teacher.null(labels) for unconditional rows")
            return condition
        if not isinstance(condition, Captions):
            found = "None" if condition is None else f"labels {tuple(condition.shape)}"
            raise ValueError(
                f"{self.kind} needs Captions, or teacher.null(captions) for unconditional rows: got {found}"
            )
        if condition.tokens.shape[-1] != self.caption_width:
            shape = tuple(condition.tokens.shape)
            raise ValueError(f"captions of {self.kind} must be (b, n, {self.caption_width}): got {shape}")
        pooled = None if condition.pooled is None else condition.pooled.shape[-1]
        if self.pooled_width not in (None, pooled):
            needed = f"a pooled vector (b, {self.pooled_width})"
            raise ValueError(f"captions of {self.kind} need {needed}: got width {pooled}")
        return condition

    def add_end_time(self) -> None:
        """Add an embedding of s to every time embedding of the model; it is initially zero."""
        for module in list(self.model.modules()):
            if isinstance(module, TimeInput):
                module.add_end_time()

    def named_encoder(self) -> CaptionEncoder:
        """Return the text encoders of the pipeline that contains the model, with the options in the record."""
        recorded = self.record and self.record.text_encoder
        query = recorded.name.partition("?")[2] if recorded else ""
        options = read_options(query, query)
        return DiffusersPrompts(self.config["model"], device=next(self.parameters()).device, **options)

    def units(self) -> list[nn.Module]:
        """Return the blocks."""
        return [*self.model.transformer_blocks, *getattr(self.model, "single_transformer_blocks", ())]

    def example(self, rows: int = 2) -> tuple[Sample, Time, Time, Condition]:
        """Return example arguments of the forward pass: zeros of the right shapes."""
        x_t = next(self.model.parameters()).new_zeros(rows, *self.sample_shape)
        times = torch.full((rows,), 0.5, device=x_t.device)
        if self.caption_width is None:
            return x_t, times, times, torch.zeros(rows, dtype=torch.long, device=x_t.device)
        pooled = x_t.new_zeros(rows, self.pooled_width) if self.pooled_width else None
        return x_t, times, times, Captions(x_t.new_zeros(rows, 2, self.caption_width), None, pooled)

    def null(self, condition: Condition) -> Condition:
        """Return null classes. Only the teacher has the text encoders for the empty prompt.

        Raises:
            ValueError: if the model reads captions.
        """
        if self.caption_width is not None:
            raise ValueError(f"{self.kind} cannot encode the empty prompt: use teacher.null(captions)")
        return super().null(condition)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the model only stores the inputs of each block and recomputes the rest in the backward pass."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.model.enable_gradient_checkpointing() if enabled else self.model.disable_gradient_checkpointing()

    def _predict(self, x: Sample, times: Times, condition: Any) -> Sample:
        dtype = next(self.model.parameters()).dtype
        condition = _pytree.tree_map_only(
            Tensor, lambda part: part.to(dtype) if part.is_floating_point() else part, condition
        )
        predicted = self.family.call(self.model, x.to(dtype), times, condition)
        # Further channels are a predicted variance.
        return predicted[:, : x.shape[1]].to(x.dtype)


def read(path: str, dtype: Dtype = "float32") -> tuple[nn.Module, str]:
    """Load a diffusers transformer, stored alone or in a pipeline; return it in eval mode with its class name."""
    # Imported here: it takes seconds, and other teachers do not need diffusers.
    import diffusers

    subfolder, config = find_config(path, "transformer", "transformer")
    kind = config.get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{path} contains a transformer of class {kind}: supported are {', '.join(FAMILIES)}")
    model = from_pretrained(getattr(diffusers, kind), path, subfolder, torch_dtype=getattr(torch, dtype))
    return model.eval(), kind
