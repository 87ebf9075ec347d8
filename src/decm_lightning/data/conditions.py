"""Data module of conditions alone: class labels or prompts without images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from decm_lightning.autoencoders.provenance import read_coder
from decm_lightning.data.protocol import HasNetwork
from decm_lightning.data.resumable import BatchDataset, ResumableData
from decm_lightning.text import CaptionEncoder, EncodedCaptions, MiniLM, UnencodedCaptions, encode, encoded
from decm_lightning.text.prompts import read_prompts
from decm_lightning.types import Batch, Condition

BATCHES = 100
"""The smallest number of batches in an epoch: few conditions are repeated."""


class ConditionRows(BatchDataset):
    """Numbered conditions without samples, each `repeats` times: row i has condition i mod `count`.

    Without `captions`, the conditions are class labels, which are the numbers.
    """

    def __init__(self, count: int, repeats: int, captions: EncodedCaptions | UnencodedCaptions | None = None) -> None:
        self.count = count
        self.repeats = repeats
        self.captions = captions

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count * self.repeats

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items, with x_1 of shape (b, 0)."""
        return Batch(torch.empty(len(items), 0), self.condition(items))

    def condition(self, items: Sequence[int]) -> Condition:
        """Return the labels, captions, or numbers of captions that are not encoded."""
        numbers: Int[Tensor, " b"] = torch.as_tensor(items) % self.count
        return numbers if self.captions is None else self.captions.read(numbers)


class Conditions(ResumableData):
    """Class labels or prompts alone, for objectives that need no data, such as `losses.free_flow`.

    Each label or prompt occurs equally often. x_1 is zeros of the network's sample shape: losses whose jumps start at
    noise do not read it, and others are refused when training starts. It has neither validation nor test data.

    Args:
        prompts: a text file with one prompt per line, or a .jsonl file with "prompt"; None for the class labels of the
            network.
        encoder: the text encoder, such as text.TextEncoder, or teachers.DiffusersPrompts; None for MiniLM.
        cache: folder of the encoded prompts.
        captions: "cached" to encode prompts once, or "on_the_fly" to encode them on the network's device for each
            batch.
        vae: the VAE that decodes the network's latents into images; None for a network that generates images.
        latents: the folder of latents that the teacher was trained on, with their normalization; None for that of the
            VAE's config.
        batch_size: rows per training batch on each device, at least 1.
        num_workers: number of loading processes; 0 is fastest.

    Raises:
        ValueError: if a number is below its minimum.
    """

    train: ConditionRows
    texts: Sequence[str] = ()
    lacks_samples: Literal[True] = True

    def __init__(
        self,
        prompts: str | None = None,
        encoder: CaptionEncoder | None = None,
        cache: str = "runs/cache",
        captions: Literal["cached", "on_the_fly"] = "cached",
        vae: str | None = None,
        latents: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers=num_workers)
        self.prompts = prompts
        self.encoder = None if prompts is None else encoder or MiniLM()
        self.cache = cache
        self.captions = captions
        self.vae = vae
        self.latents = latents
        self.num_classes = 0

    def prepare_data(self) -> None:
        """Encode prompts that are not in the cache, in one process of each machine."""
        if self.prompts is not None:
            self._encode([prompt.text for prompt in read_prompts(Path(self.prompts))])

    def setup(self, stage: str) -> None:
        """Read the conditions.

        Raises:
            ImportError: if prompts must be encoded and a package is not installed.
            OSError: if the file of prompts or the VAE does not exist.
            ValueError: if a prompt is empty, the VAE does not fit the latents, or there are no prompts and the network
                has no classes.
        """
        if self.vae is not None and self.coder is None:
            self.coder = read_coder(self.vae, self.latents)
        if self.prompts is not None:
            self.texts = [prompt.text for prompt in read_prompts(Path(self.prompts))]
            self.train = self._rows(len(self.texts), self._encode(self.texts))
            return
        module = self.trainer.lightning_module if self.trainer else None
        self.num_classes = module.network.num_classes if isinstance(module, HasNetwork) else 0
        if not self.num_classes:
            raise ValueError("Conditions needs prompts, or a trainer with a network that has classes")
        self.train = self._rows(self.num_classes)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Return zeros as x_1, and encoded prompts."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        shape = module.network.sample_shape if isinstance(module, HasNetwork) else ()
        x_1 = batch.x_1.new_zeros(len(batch.x_1), *shape)
        return Batch(x_1, encoded(self.train.captions, batch.condition, self.encoder, x_1.device))

    def condition(self, rows: Sequence[int], seed: int = 0) -> Condition:
        """Return the conditions of the samples with the numbers `rows`: sample i has the label or prompt i mod n."""
        return encoded(self.train.captions, self.train.condition(rows), self.encoder, self.device)

    def _rows(self, count: int, captions: EncodedCaptions | UnencodedCaptions | None = None) -> ConditionRows:
        world = self.trainer.world_size if self.trainer else 1
        return ConditionRows(count, -(-BATCHES * world * self.batch_size // count), captions)

    def _encode(self, texts: Sequence[str]) -> EncodedCaptions | UnencodedCaptions:
        if self.captions == "cached":
            assert self.encoder is not None
            return encode(texts, self.encoder, self.cache, self.device)
        return UnencodedCaptions(texts)
