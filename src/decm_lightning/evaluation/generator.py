"""Samples as pictures: which condition and noise sample number i has, and how latents become images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from numpy.random import SeedSequence
from torch import Tensor, nn

from decm_lightning.conditions import select
from decm_lightning.errors import NonFiniteError
from decm_lightning.evaluation.spec import Cell
from decm_lightning.evaluation.usage import Usage
from decm_lightning.image_writer import to_uint8
from decm_lightning.metrics.metric import Prompts
from decm_lightning.networks import Network
from decm_lightning.samplers import SamplerName
from decm_lightning.types import Batch, Condition, FlowMapNetwork, Sample

LabelLaw = Literal["balanced", "uniform"]
# What is drawn for a sample, apart from its noise.
PUT_BACK, LABEL = 1, 2
DECODED_AT_ONCE = 64


class SampleSource(Protocol):
    """What a LightningModule must have for samples to be drawn from it; `FlowTraining` has it."""

    average: Network

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return what can be sampled, by name."""

    def sample(
        self,
        x_0: Sample,
        condition: Condition,
        model: str,
        sampler: SamplerName,
        steps: int,
        generator: torch.Generator | None,
    ) -> Sample:
        """Return samples from noise x_0."""


@dataclass(frozen=True)
class Drawing:
    """Draws samples of a module as pictures; number i starts from the same noise and condition in every cell.

    Noise x_0 depends on the seed and the number of the sample alone: it is the same for every cell, batch size, device
    and number of processes; so is the condition. Noise that a sampler puts back also depends on the device and on which
    rows go together. Neither torch's global generators nor the training mode of any module change.

    Args:
        module: a `SampleSource`.
        data: the datamodule. Its method `condition(rows, seed)` gives the conditions, if it has one; otherwise they are
            labels below its `num_classes`. Its `texts`, if it has them, are the same conditions in words, over and over
            again where there are more samples. Its method `decode(x)`, if it has one, turns samples into images in
            [-1, 1]; its method `release()`, if it has one, moves the network that does so off the accelerator.
        labels: "balanced", i mod num_classes; or "uniform", drawn by the seed.
        seed: of noise and labels.
    """

    module: L.LightningModule
    data: Any
    labels: LabelLaw = "balanced"
    seed: int = 0

    @property
    def source(self) -> SampleSource:
        """The module, as what it must be."""
        return cast(SampleSource, self.module)

    def release(self) -> None:
        """Move the networks that decode samples off the accelerator, by the datamodule's `release` if it has one."""
        release = getattr(self.data, "release", None)
        if release is not None:
            release()

    def check(self, cells: Sequence[Cell]) -> None:
        """Make sure that every cell can be drawn.

        Raises:
            ValueError: if the data have no conditions, the samples are no images and cannot be decoded, or a cell's
                model does not exist.
        """
        if not hasattr(self.data, "condition") and getattr(self.data, "num_classes", None) is None:
            raise ValueError("samples need labels: give the trainer a datamodule with num_classes, such as data.Digits")
        shape = self.source.average.sample_shape
        if len(shape) != 3:
            raise ValueError(f"samples must be images (c, h, w): the network makes {shape}")
        # Latents are decoded once now, rather than in vain after hours.
        seen = shape if shape[0] in (1, 3) else tuple(self.pictures(torch.zeros(1, *shape)).shape[1:])
        if seen[0] not in (1, 3):
            remedy = "give the trainer a datamodule with decode(x)"
            raise ValueError(f"images have 1 or 3 channels: the network makes {shape}, which needs a decoder: {remedy}")
        for cell in cells:
            if cell.model not in (models := self.source.models()):
                raise ValueError(f"cell {cell}: model must be one of {', '.join(models)}: got {cell.model!r}")

    def condition(self, rows: Sequence[int]) -> Condition:
        """Return the conditions of samples number `rows`, on the module's device."""
        if hasattr(self.data, "condition"):
            condition = self.data.condition(rows, self.seed)
        else:
            condition = torch.tensor([self._label(row) for row in rows])
        return move_data_to_device(condition, self.source.device)

    def texts(self, rows: Sequence[int]) -> list[str] | None:
        """Return the captions of samples number `rows` in words, if the data have any."""
        texts = getattr(self.data, "texts", None)
        return None if texts is None else [texts[row % len(texts)] for row in rows]

    def prompts(self, rows: Sequence[int]) -> Prompts:
        """Return what samples number `rows` are drawn for, perhaps none."""
        return Prompts(select(self.condition(rows or range(1)), slice(len(rows))), self.texts(rows))

    def samples(self, cell: Cell, rows: Sequence[int]) -> Sample:
        """Return samples number `rows` of a cell, as the network makes them.

        Raises:
            NonFiniteError: if one is NaN or infinite.
        """
        shape = self.source.average.sample_shape
        # Drawn row by row on the CPU: one generator for all would tie a sample's noise to its batch.
        x_0 = torch.stack([torch.randn(shape, generator=_generator("cpu", self.seed, row)) for row in rows])
        with _evaluating(self.module):
            x = self.source.sample(
                x_0.to(self.source.device, self.source.dtype),
                self.condition(rows),
                model=cell.model,
                sampler=cell.sampler,
                steps=cell.steps,
                generator=_generator(self.source.device, self.seed, rows[0], PUT_BACK),
            )
        if not x.isfinite().all():
            raise NonFiniteError(f"samples of {cell} are not finite: the weights of {cell.model!r} have diverged")
        return x

    def pictures(self, x: Sample) -> Tensor:
        """Return samples, or data of a loader, as uint8 images (b, c, h, w)."""
        return pictures(x, self.data)

    def read(self, batch: Batch) -> Batch:
        """Return a batch of the data as uint8 images and their conditions, where the module computes."""
        batch = self.data.on_after_batch_transfer(move_data_to_device(batch, self.source.device), 0)
        return Batch(self.pictures(batch.x_1), batch.condition)

    def draw(self, cell: Cell, rows: Sequence[int]) -> Tensor:
        """Return samples number `rows` of a cell as uint8 images (len(rows), c, h, w).

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
        """
        return self.pictures(self.samples(cell, rows))

    def grid(self, cells: Sequence[Cell], columns: int) -> Tensor:
        """Return uint8 images (cells, columns, c, h, w): one row a cell, and the first classes or conditions across."""
        balanced = replace(self, labels="balanced")
        if not hasattr(self.data, "condition"):
            columns = min(columns, self.data.num_classes)
        return torch.stack([balanced.draw(cell, range(columns)) for cell in cells])

    def usage(self, cell: Cell) -> Usage:
        """Return the network evaluations of a sample, counted on two: a guided step can cost two."""
        usage = Usage(2)
        with usage.record(self.source.average, getattr(self.module, "teacher", None)):
            self.samples(cell, range(2))
        return usage

    def _label(self, row: int) -> int:
        classes = int(self.data.num_classes)
        if self.labels == "balanced":
            return row % classes
        return int(torch.randint(classes, (), generator=_generator("cpu", self.seed, row, LABEL)))


@torch.no_grad()
def pictures(x: Sample, data: Any) -> Tensor:
    """Return x as uint8 images (b, c, h, w), through the datamodule's `decode` if it has one, some at a time."""
    decode = getattr(data, "decode", None)
    return to_uint8(x) if decode is None else torch.cat([to_uint8(decode(part)) for part in x.split(DECODED_AT_ONCE)])


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _generator(device: str | torch.device, *entropy: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(SeedSequence(entropy).generate_state(1)[0]))
