"""Generate numbered samples: choose their conditions, run the sampler, and decode them to images."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
from jaxtyping import UInt8
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from decm_lightning import samplers
from decm_lightning.conditions import select
from decm_lightning.data.protocol import EvaluationData
from decm_lightning.errors import NonFiniteError
from decm_lightning.evaluation.source import SampleSource
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.image_writer import short, to_uint8
from decm_lightning.metrics.metric import Prompts
from decm_lightning.networks.generation import evaluating
from decm_lightning.progress import Progress
from decm_lightning.seeds import generator_of
from decm_lightning.types import Batch, Condition, Sample

LabelLaw = Literal["balanced", "uniform"]
LABEL = 1
"""The label of sample i uses generator_of(seed, i, LABEL), and its noise generator_of(seed, i)."""
DECODED_AT_ONCE = 64


class SampleGenerator:
    """Generates samples of a module as images. Sample i has the same noise and condition for every spec.

    Both depend only on the seed and on i (`samplers.generate`), and not on the batch, the device or the number of
    processes. Sampling changes neither torch's global generators nor the training mode of any module.

    Args:
        module: a `SampleSource`.
        datamodule: provides classes or conditions, and optionally captions and a decoder (`data.protocol`).
        labels: "balanced", i mod num_classes; or "uniform", from the seed. Data with conditions have no labels.
        seed: seed of noise and labels.

    Raises:
        ValueError: if the module cannot be sampled.
    """

    def __init__(self, module: Any, datamodule: Any, labels: LabelLaw = "balanced", seed: int = 0) -> None:
        if not isinstance(module, SampleSource):
            needed = "models(), average, ema_decay, teacher and guidance, as training.FlowTraining has"
            raise ValueError(f"samples need a module with {needed}: got {type(module).__name__}")
        self.source = module
        self.datamodule = datamodule
        self.data = EvaluationData.of(datamodule)
        self.labels = labels
        self.seed = seed

    def check(self, specs: Sequence[SamplingSpec]) -> None:
        """Check that every spec can be generated.

        Raises:
            ValueError: if the data have no conditions, the samples are not images and cannot be decoded, or a spec's
                model does not exist.
        """
        if self.data.condition is None and not self.data.num_classes:
            raise ValueError("samples need labels: give the trainer a datamodule with num_classes, such as data.Digits")
        network = self.source.average
        if self.data.condition is None and self.data.num_classes > network.num_classes:
            found = f"the data have {self.data.num_classes}, use the config of its training"
            raise ValueError(f"the model has {network.num_classes} classes: {found}")
        shape = network.sample_shape
        if len(shape) != 3:
            raise ValueError(f"samples must be images (c, h, w): the network generates {shape}")
        # Decode one latent now, so that a missing decoder does not fail after hours.
        seen = shape if shape[0] in (1, 3) else tuple(self.images(torch.zeros(1, *shape)).shape[1:])
        if seen[0] not in (1, 3):
            remedy = "give the trainer a datamodule with decode(x)"
            raise ValueError(f"images must have 1 or 3 channels: the network generates {shape}; {remedy}")
        for spec in specs:
            if spec.model not in (models := self.source.models()):
                raise ValueError(f"spec {spec}: model must be one of {', '.join(models)}: got {spec.model!r}")

    def condition(self, rows: Sequence[int]) -> Condition:
        """Return the conditions of samples `rows`, on the module's device."""
        if self.data.condition is None:
            condition: Condition = torch.tensor([self._label(row) for row in rows])
        else:
            condition = self.data.condition(rows, self.seed)
        return move_data_to_device(condition, self.source.device)

    def prompts(self, rows: Sequence[int]) -> Prompts:
        """Return the conditions of samples `rows`, which may be empty, and their captions if the data have captions."""
        return Prompts(select(self.condition(rows or range(1)), slice(len(rows))), self.captions(rows))

    def captions(self, rows: Sequence[int]) -> list[str] | None:
        """Return the captions of samples `rows`, or None if the data have no captions."""
        texts = self.data.texts
        return [texts[row % len(texts)] for row in rows] if texts else None

    def headings(self, rows: Sequence[int]) -> list[str]:
        """Return short captions or labels of samples `rows`; an empty list for other conditions."""
        if (captions := self.captions(rows)) is not None:
            return [short(caption) for caption in captions]
        return [] if self.data.condition else [str(self._label(row)) for row in rows]

    def samples(self, spec: SamplingSpec, rows: Sequence[int]) -> Sample:
        """Return samples `rows` as the network generates them, before decoding.

        Raises:
            NonFiniteError: if one is NaN or infinite.
        """
        source = self.source
        with evaluating(cast(nn.Module, source)):
            x = samplers.generate(
                source.models()[spec.model],
                spec.function(),
                self.condition(rows),
                spec.steps,
                shape=source.average.sample_shape,
                rows=rows,
                seed=self.seed,
                device=source.device,
                dtype=source.dtype,
            )
        if not x.isfinite().all():
            raise NonFiniteError(f"samples of {spec} are not finite: the weights of {spec.model!r} have diverged")
        return x

    def generate(self, spec: SamplingSpec, rows: Sequence[int]) -> UInt8[Tensor, "n c h w"]:
        """Return samples `rows` as images.

        Without rows it generates sample 0 and returns an empty tensor: all processes must run a sharded network.

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
        """
        return self.images(self.samples(spec, rows or range(1)))[: len(rows)]

    @torch.no_grad()
    def images(self, x: Sample) -> UInt8[Tensor, "n c h w"]:
        """Decode samples, or a loader's data, to images, 64 at a time."""
        return torch.cat([to_uint8(self.data.decode(part)) for part in x.split(DECODED_AT_ONCE)])

    def read(self, batch: Batch) -> Batch:
        """Return a batch of the data as uint8 images and their conditions, on the module's device."""
        batch = self.datamodule.on_after_batch_transfer(move_data_to_device(batch, self.source.device), 0)
        return Batch(self.images(batch.x_1), batch.condition)

    def columns(self, columns: int) -> int:
        """Return the number of columns of a grid: the same number for each class, if there are at most `columns`."""
        classes = self.data.num_classes
        return columns if self.data.condition or classes > columns else columns // classes * classes

    def grid(self, specs: Sequence[SamplingSpec], columns: int) -> UInt8[Tensor, "specs n c h w"]:
        """Return the first samples of each spec, equally many of each class if there are at most `columns` classes."""
        return torch.stack([self.generate(spec, range(self.columns(columns))) for spec in specs])

    def describe_labels(self) -> str:
        """Return a description of sample i's condition."""
        if self.data.condition:
            return "sample i has the i-th condition of the data"
        if self.labels == "balanced":
            return f"sample i has the label i mod {self.data.num_classes}"
        return f"uniform over {self.data.num_classes} classes, by the seed"

    def _label(self, row: int) -> int:
        classes = self.data.num_classes
        if self.labels == "balanced":
            return row % classes
        return int(torch.randint(classes, (), generator=generator_of(self.seed, row, LABEL)))


def progress(trainer: L.Trainer, total: int) -> Progress:
    """Return a progress bar over images, shown by the first process if the trainer shows one."""
    hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
    return Progress(desc="sampling", total=total, unit="image", disable=hidden)
