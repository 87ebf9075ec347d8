"""Encode captions with the text encoders and the `encode_prompt` of a diffusers pipeline."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from decm_lightning.errors import check_at_least
from decm_lightning.networks.hub import cache_without_network, download
from decm_lightning.samplers.options import write_options
from decm_lightning.teachers.diffusers_families import FAMILIES, Family, PromptOutputs
from decm_lightning.text.encoder import CaptionEncoder, fingerprint
from decm_lightning.types import Captions


class DiffusersPrompts(CaptionEncoder):
    """Encode prompts with the tokenizers and text encoders of a pipeline of one of the `FAMILIES`.

    The encoders are loaded at the first call. As in its pipeline, the prompts of Sana are encoded with an instruction
    for the text encoder, and its empty prompt without.

    Args:
        model: the folder of a pipeline, or its name on the Hugging Face hub.
        max_tokens: number of tokens to which prompts are padded or truncated (max_sequence_length in diffusers; SD3
            prepends 77 tokens of CLIP); None for the default of the pipeline.
        dtype: dtype of the text encoders: "float32", "bfloat16" or "float16".
        device: device of the text encoders; training moves them to its device.

    Raises:
        ValueError: if max_tokens is below 1.
    """

    def __init__(
        self, model: str, max_tokens: int | None = None, dtype: str = "float32", device: str | torch.device = "cpu"
    ) -> None:
        check_at_least(1, max_tokens=max_tokens)
        self.model = model
        self.requested_tokens = max_tokens
        self.dtype = dtype
        self.device = torch.device(device)

    @property
    def name(self) -> str:
        """The pipeline, with the options that are not the default."""
        options = {"max_tokens": self.requested_tokens} if self.requested_tokens else {}
        return self.model + write_options(options | ({} if self.dtype == "float32" else {"dtype": self.dtype}))

    @cached_property
    def max_tokens(self) -> int:  # type: ignore[override]
        """The number of tokens to which prompts are padded or truncated: as requested, or the pipeline's default."""
        default: int = inspect.signature(self._class.encode_prompt).parameters["max_sequence_length"].default
        return self.requested_tokens or default

    @cached_property
    def identity(self) -> str:
        """A hash of the pipeline class, max_tokens, dtype, and the files of encoders and tokenizers."""
        files = [file for part in self._parts for file in (self._folder / part).glob("*") if file.is_file()]
        return fingerprint(f"{self._class.__name__} {self.max_tokens} {self.dtype}", sorted(files), self._folder)

    def to(self, device: str | torch.device) -> None:
        """Move the encoders to a device, now or when they are loaded."""
        moved = torch.device(device) != self.device
        self.device = torch.device(device)
        if moved and "pipeline" in self.__dict__:
            self.pipeline.to(self.device)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Return the untruncated number of tokens of each caption, by the pipeline's last tokenizer (T5 or Gemma)."""
        return [len(ids) for ids in self._tokenizer(list(captions), verbose=False)["input_ids"]]

    def __call__(self, prompts: Sequence[str]) -> Captions:
        """Return the encoded captions, (b, n, d), on the device of the encoders.

        Raises:
            OSError: if the folder or hub name does not exist.
            ValueError: if it is not a pipeline of a supported family.
        """
        return _captions(self._encode(prompts, guided=False), self._family.prompt)

    def empty(self) -> Captions:
        """Return the empty prompt of guidance, one row. Encoders loaded for it are released afterwards."""
        in_use = "pipeline" in self.__dict__
        outputs = self._family.empty
        captions = self([""]) if outputs is None else _captions(self._encode([""], guided=True), outputs)
        if not in_use:
            del self.pipeline
        return captions

    @cached_property
    @torch.inference_mode(False)
    def pipeline(self) -> Any:
        """The pipeline without transformer and VAE."""
        dtype = getattr(torch, self.dtype)
        options = {"transformer": None, "vae": None, "torch_dtype": dtype}
        with cache_without_network(self.model):
            pipeline = self._class.from_pretrained(self.model, **options)
        return pipeline.to(self.device)

    @cached_property
    def _index(self) -> dict[str, Any]:
        from diffusers import DiffusionPipeline

        if Path(self.model).is_dir() and not (Path(self.model) / "model_index.json").is_file():
            raise ValueError(f"{self.model} has no text encoders: pass a pipeline folder, which has a model_index.json")
        return dict(DiffusionPipeline.load_config(download(self.model, "pipeline", ["model_index.json"])))

    @property
    def _class(self) -> Any:
        import diffusers

        _ = self._family
        return getattr(diffusers, self._index["_class_name"])

    @property
    def _family(self) -> Family:
        name = self._index["_class_name"]
        known = {family.pipeline: family for family in FAMILIES.values() if family.pipeline}
        for beginning, family in known.items():
            if name.startswith(beginning):
                return family
        raise ValueError(f"{self.model} is a {name}: supported pipelines are {', '.join(known)}")

    @property
    def _parts(self) -> list[str]:
        """The names of the pipeline's encoders and tokenizers."""
        named = {name: kind for name, kind in self._index.items() if name.startswith(("text_encoder", "tokenizer"))}
        return sorted(name for name, kind in named.items() if kind[0] is not None)

    @cached_property
    def _folder(self) -> Path:
        patterns = [f"{part}/*" for part in self._parts]
        return download(self.model, "pipeline", patterns, ignore=["*.bin", "*.fp16*"])

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        last = [part for part in self._parts if part.startswith("tokenizer")][-1]
        with cache_without_network(self.model):
            return getattr(transformers, self._index[last][1]).from_pretrained(self.model, subfolder=last)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], guided: bool) -> tuple[Any, ...]:
        encode = self.pipeline.encode_prompt
        instruction = inspect.signature(type(self.pipeline).__call__).parameters.get("complex_human_instruction")
        options = {
            "prompt": list(prompts),
            "prompt_2": None,
            "prompt_3": None,
            "device": self.device,
            "do_classifier_free_guidance": guided,
            "complex_human_instruction": None if instruction is None else instruction.default,
            "max_sequence_length": self.max_tokens,
        }
        known = inspect.signature(encode).parameters
        with _quiet():
            return encode(**{name: value for name, value in options.items() if name in known})


def _captions(encoded: tuple[Any, ...], outputs: PromptOutputs) -> Captions:
    mask = None if outputs.mask is None else encoded[outputs.mask].bool()
    pooled = None if outputs.pooled is None else encoded[outputs.pooled]
    return Captions(encoded[outputs.tokens], mask, pooled)


@contextmanager
def _quiet() -> Iterator[None]:
    # Pipelines log every caption that they truncate, in training at every step.
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
