"""Captions by the text encoders of a pipeline of diffusers, through the pipeline's own code."""

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from decm_lightning.types import Captions


class Places(NamedTuple):
    """Where in what a pipeline's `encode_prompt` returns the parts of captions are."""

    tokens: int
    mask: int | None = None
    pooled: int | None = None


PLACES: dict[str, tuple[Places, Places | None]] = {
    "StableDiffusion3": (Places(tokens=0, pooled=2), Places(tokens=1, pooled=3)),
    "Flux": (Places(tokens=0, pooled=1), None),
    "Sana": (Places(tokens=0, mask=1), Places(tokens=2, mask=3)),
    "PixArt": (Places(tokens=0, mask=1), Places(tokens=2, mask=3)),
}
"""By the beginning of the pipeline's class: of the prompts, and of the empty prompt if it is encoded apart."""


class DiffusersPrompts:
    """Prompts to captions, by the tokenizers and text encoders of a pipeline of SD3, Flux, Sana or PixArt.

    They are loaded at the first call. Sana's prompts go with its pipeline's instruction for the text encoder, and the
    empty prompt of guidance without, as there.

    Args:
        model: the folder of a pipeline, or its name on the Hugging Face hub.
        max_tokens: the length in tokens to which prompts are filled up or cut (max_sequence_length in diffusers; SD3
            puts 77 of CLIP before them); None for the pipeline's own.
        dtype: of the text encoders: "float32", "bfloat16" or "float16".
        device: where they work.

    Raises:
        ValueError: if max_tokens is below 1.
    """

    def __init__(
        self, model: str, max_tokens: int | None = None, dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1: got {max_tokens}")
        self.model = model
        self.max_tokens = max_tokens
        self.dtype = dtype
        self.device = device

    def __call__(self, prompts: Sequence[str]) -> Captions:
        """Return the captions, (b, n, d), on the encoders' device.

        Raises:
            OSError: if there is no such folder or name.
            ValueError: if it is no pipeline, or one of another family.
        """
        own, _ = self._places
        return self._take(self._encode(prompts, guided=False), own)

    def empty(self) -> Captions:
        """Return the empty prompt of guidance, one row; the encoders are let go afterwards if they were not in use."""
        in_use = "pipeline" in self.__dict__
        _, apart = self._places
        captions = self([""]) if apart is None else self._take(self._encode([""], guided=True), apart)
        if not in_use:
            del self.pipeline
        return captions

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline without what makes images of captions."""
        from diffusers import DiffusionPipeline

        if Path(self.model).is_dir() and not (Path(self.model) / "model_index.json").is_file():
            raise ValueError(f"{self.model} has no text encoders: give the folder of a pipeline, with model_index.json")
        dtype = getattr(torch, self.dtype)
        pipeline = DiffusionPipeline.from_pretrained(self.model, transformer=None, vae=None, torch_dtype=dtype)
        return pipeline.to(self.device)

    @property
    def _places(self) -> tuple[Places, Places | None]:
        name = type(self.pipeline).__name__
        for beginning, places in PLACES.items():
            if name.startswith(beginning):
                return places
        raise ValueError(f"{self.model} is a {name}: captions are known of {', '.join(PLACES)}")

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], guided: bool) -> tuple[Any, ...]:
        encode = self.pipeline.encode_prompt
        instruction = inspect.signature(type(self.pipeline).__call__).parameters.get("complex_human_instruction")
        options = {
            "prompt": list(prompts),
            "prompt_2": None,
            "prompt_3": None,
            "device": torch.device(self.device),
            "do_classifier_free_guidance": guided,
            "complex_human_instruction": None if instruction is None else instruction.default,
        }
        if self.max_tokens is not None:
            options["max_sequence_length"] = self.max_tokens
        known = inspect.signature(encode).parameters
        return encode(**{name: value for name, value in options.items() if name in known})

    @staticmethod
    def _take(encoded: tuple[Any, ...], places: Places) -> Captions:
        mask = None if places.mask is None else encoded[places.mask].bool()
        pooled = None if places.pooled is None else encoded[places.pooled]
        return Captions(encoded[places.tokens], mask, pooled)
