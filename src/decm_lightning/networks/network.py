"""The base class of all networks: a flow map with its condition, its own description, and `generate`."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor, nn
from torch.utils import _pytree

from decm_lightning import samplers
from decm_lightning.conditions import select
from decm_lightning.files import atomic, tensors_sha256
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.samplers import Sampler
from decm_lightning.seeds import check_seed
from decm_lightning.text import CaptionEncoder, named_encoder
from decm_lightning.types import Captions, Condition, Sample, Time

Requested = int | str | Sequence[int] | Sequence[str] | Tensor | Captions | None
"""Labels or captions, or one of them for all samples; None for each class once, or for no condition."""
BATCH = 256
"""Samples that are computed together, as in `decm sample`."""


class Network(nn.Module, PyTorchModelHubMixin, ABC, library_name="decm-lightning", license="apache-2.0"):
    """A FlowMapNetwork with weights: u = network(x_t, t, s, condition).

    Attributes:
        config: the arguments that build the network again.
        sample_shape: the shape of one sample, without the batch.
        num_classes: how many classes there are; index num_classes is the null class of classifier-free guidance.
        time_scale: the factor on times before they are embedded; a central difference's step depends on it.
        gradient_checkpointing: keep only the inputs of each block for the backward pass, and compute the rest again.
    """

    config: dict[str, Any]
    sample_shape: tuple[int, ...]
    num_classes: int
    time_scale: float = 1.0
    gradient_checkpointing: bool = False

    @abstractmethod
    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), shaped like x_t."""

    @abstractmethod
    def with_end_time(self) -> "Network":
        """Return a copy that also reads s, and at first equals this network for every s."""

    def generate(
        self,
        condition: Requested = None,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | Sampler | None = None,
        rows: Sequence[int] | None = None,
        *,
        encoder: CaptionEncoder | str | None = None,
        decoder: Callable[[Sample], Sample] | None = None,
        **options: Any,
    ) -> list[Image.Image] | Tensor:
        """Return images, or a tensor (b, *sample_shape) from a network of anything but images.

        Sample i of a seed is the same in every command and callback, see `samplers.generate`. The network computes on
        its own device, in eval mode and without gradients; the modes of its parts are restored.

            student = decm_lightning.load("weights/digits/student")
            three, five, seven = student.generate([3, 5, 7], steps=2)

        Args:
            condition: labels from 0 to num_classes, which is the null class; captions as text or encoded; or a single
                one for all rows. None for each class once; with `rows`, for class i mod num_classes in row i.
            steps: network evaluations; None for 2, and for 50 with euler.
            seed: from 0 to 2**63 - 1.
            sampler: as `samplers.sampler` takes it; None for mix, and for euler if the network ignores the end time.
            rows: the numbers of the samples; None for 0, 1, ...
            encoder: the text encoder of captions that are text, or its name; None for `caption_encoder()`.
            decoder: turns latents into images in [-1, 1], such as `autoencoder.decode` after their normalization.
            options: the sampler's, such as times or s1.

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
            ValueError: if the condition does not fit the network or the rows, the samples are latents and there is no
                decoder, or an argument is out of its range.
        """
        check_seed(seed)
        if sampler is None:
            sampler = "mix" if self.reads_end_time else "euler"
        if steps is None:
            steps = 50 if sampler == "euler" else 2
        is_image = len(self.sample_shape) == 3
        if is_image and decoder is None and self.sample_shape[0] not in (1, 3):
            raise ValueError(f"samples are latents {self.sample_shape}, not images: give decoder=, a VAE's")
        method = samplers.sampler(sampler, **options)
        with evaluating(self), torch.no_grad():
            conditions, rows = self._conditions(condition, rows, encoder)
            batches = [slice(first, first + BATCH) for first in range(0, len(rows), BATCH)]
            parts = [self._samples(method, select(conditions, part), steps, rows[part], seed) for part in batches]
            if not is_image:
                return torch.cat(parts)
            decoded = parts if decoder is None else [decoder(part) for part in parts]
            return [to_pil(image) for part in decoded for image in to_uint8(part).cpu()]

    @property
    def reads_end_time(self) -> bool:
        """Whether it is a flow map u(x_t, t, s), rather than a velocity for every s."""
        return bool(self.config.get("end_time", True))

    def caption_encoder(self) -> CaptionEncoder:
        """Return the text encoder that the config names under `text_encoder`.

        Raises:
            ValueError: if it names none.
        """
        name = self.config.get("text_encoder")
        if name is None:
            raise ValueError("the network's config names no text_encoder: give encoder=, the one it was trained with")
        return named_encoder(name, next(self.parameters()).device)

    def _samples(self, method: Sampler, condition: Condition, steps: int, rows: Sequence[int], seed: int) -> Sample:
        # Adapters are wider than the frozen weights around them, and a model with adapters casts its own input.
        dtype = reduce(torch.promote_types, (parameter.dtype for parameter in self.parameters()))
        device = next(self.parameters()).device
        return samplers.generate(
            self, method, condition, steps, shape=self.sample_shape, rows=rows, seed=seed, device=device, dtype=dtype
        )

    def _conditions(
        self, requested: Requested, rows: Sequence[int] | None, encoder: CaptionEncoder | str | None
    ) -> tuple[Condition, Sequence[int]]:
        """Return a condition with a row for each sample, on the network's device, and the numbers of the samples."""
        device = next(self.parameters()).device
        found: Condition
        if isinstance(self.example(1)[3], Captions):
            found = self._captions(requested, encoder)
        elif encoder is not None or isinstance(requested, str | Captions):
            raise ValueError(f"{type(self).__name__} does not read captions")
        elif not self.num_classes:
            if requested is not None:
                raise ValueError(f"{type(self).__name__} has no condition: got {requested!r}")
            found = None
        else:
            found = self._labels(requested, rows)
        count = 1 if found is None else len(_pytree.tree_leaves(found)[0])
        rows = range(count) if rows is None else rows
        if count == 1 < len(rows):
            found = select(found, torch.zeros(len(rows), dtype=torch.long))
        elif count != len(rows) or not count:
            raise ValueError(f"rows must be as many as conditions, at least one: got {len(rows)} and {count}")
        return _pytree.tree_map_only(Tensor, lambda part: part.to(device), found), rows

    def _captions(self, requested: Requested, encoder: CaptionEncoder | str | None) -> Condition:
        if isinstance(requested, Captions):
            return requested
        texts = [requested] if isinstance(requested, str) else requested
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{type(self).__name__} reads captions: give a text or a list of texts: got {requested!r}")
        if encoder is None:
            encoder = self.caption_encoder()
        elif isinstance(encoder, str):
            encoder = named_encoder(encoder, next(self.parameters()).device)
        different = list(dict.fromkeys(map(str, texts)))
        encoder.measured(different)
        captions = encoder(different)
        return select(captions, torch.tensor([different.index(str(text)) for text in texts]))

    def _labels(self, requested: Requested, rows: Sequence[int] | None) -> Tensor:
        if requested is None:
            requested = [row % self.num_classes for row in (range(self.num_classes) if rows is None else rows)]
        labels = torch.atleast_1d(torch.as_tensor(requested))
        if labels.ndim > 1 or (labels.numel() and labels.is_floating_point()):
            raise ValueError(f"labels must be a list of integers: got {labels.dtype} {tuple(labels.shape)}")
        if (outside := labels[(labels < 0) | (labels > self.num_classes)]).numel():
            raise ValueError(f"labels must be from 0 to {self.num_classes}, the null class: got {outside.tolist()}")
        return labels.long()

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin's own config.json would not name the class, which `load` needs.
        from decm_lightning.networks.pretrained import CONFIG, describe

        super()._save_pretrained(save_directory)
        with atomic(save_directory / CONFIG) as config:
            config.write_text(json.dumps(describe(self), sort_keys=True, indent=2), encoding="utf-8")

    def identity(self) -> str:
        """Return the first 16 digits of the SHA-256 of all weights and buffers."""
        return tensors_sha256(self.state_dict())[:16]

    def units(self) -> list[nn.Module]:
        """Return the repeated parts, each compiled and sharded by itself; the whole where there are none."""
        return [self]

    def compile_units(self) -> "Network":
        """Compile each unit without graph breaks, in place and once for all that are alike; return the network.

        Only its `forward` is compiled, so that hooks, such as FSDP's, stay outside, and parameters keep their names.
        """
        for unit in self.units():
            # Widths, modes and kinds of rows have graphs of their own, over all networks of a process; beyond the
            # limit, which is 8 unless told, is an error.
            compiled = torch.compile(unit.forward, fullgraph=True, recompile_limit=64)  # type: ignore[call-overload]
            unit.forward = compiled  # type: ignore[method-assign]
        return self

    def example(self, rows: int = 2) -> tuple[Sample, Time, Time, Condition]:
        """Return arguments that this network takes: zeros of the right shapes, and classes if it has any."""
        parameter = next(self.parameters())
        times = torch.full((rows,), 0.5, device=parameter.device)
        labels = torch.zeros(rows, dtype=torch.long, device=parameter.device) if self.num_classes else None
        return parameter.new_zeros(rows, *self.sample_shape), times, times, labels

    def null(self, condition: Condition) -> Condition:
        """Return as many null classes as there are labels; None where the condition is not of labels."""
        return torch.full_like(condition, self.num_classes) if isinstance(condition, Tensor) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore the mode of each of its parts afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
