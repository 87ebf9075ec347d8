"""Writes the samples of `decm predict`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset

from decm_lightning.evaluation.generator import pictures
from decm_lightning.evaluation.protocol import origin
from decm_lightning.evaluation.sample_folder import SampleFolder, sample_name
from decm_lightning.evaluation.spec import Cell
from decm_lightning.even_split import EvenBatches
from decm_lightning.files import tensors_sha256
from decm_lightning.teachers import Teacher
from decm_lightning.types import Batch

DIGITS = 16
"""The length of a hash of labels or captions in settings.json."""


class SampleWriter(BasePredictionWriter):
    """Writes one PNG for each label or other condition of the prediction loader, numbered by its row.

    Every row is written once for any number of processes. The folder gets a settings.json; it is refused if it has
    samples of other settings, weights, labels or captions, or of another device, batch size or number of processes,
    which determine the noise of a row.

    Args:
        folder: where to write; created if it is missing.
        cell: the samples, "model/sampler/steps", such as "student/mix/2".

    Raises:
        ValueError: if the cell is not of that form.
    """

    def __init__(self, folder: str, cell: str = "student/mix/1") -> None:
        super().__init__("batch")
        self.folder = Path(folder)
        self.cell = Cell.parse(cell)
        self.written = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the module what to sample, and prepare the folder.

        Raises:
            ValueError: if the folder has samples of other settings.
        """
        super().on_predict_start(trainer, pl_module)
        pl_module.draws = self.cell  # type: ignore[assignment]
        self.written = 0
        self.samples = SampleFolder(self.folder, self._settings(trainer, pl_module))
        self.samples.begin()

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch.

        Raises:
            ValueError: if the rows have no numbers: several processes, and a loader without a sampler.
            NonFiniteError: if a sample is NaN or infinite.
        """
        drawn = Batch(*prediction)
        numbers = batch_indices or self._numbers(trainer, len(drawn.x_1), batch_idx)
        labels: list[int] | list[None] = [None] * len(numbers)
        if isinstance(drawn.condition, Tensor) and drawn.condition.ndim == 1:
            labels = drawn.condition.tolist()
        images = pictures(drawn.x_1, trainer.datamodule)  # type: ignore[attr-defined]
        # The rows that only fill up a batch come last, and have no number.
        for number, label, image in zip(numbers, labels, images, strict=False):
            self.samples.write(sample_name(number, label), image)
        self.written += len(numbers)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the module as it was."""
        pl_module.draws = None  # type: ignore[assignment]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        pl_module.draws = None  # type: ignore[assignment]

    def _numbers(self, trainer: L.Trainer, rows: int, batch_idx: int) -> Sequence[int]:
        sampler = getattr(self._loader(trainer), "sampler", None)
        if isinstance(sampler, EvenBatches):
            return sampler.batches[batch_idx]
        if trainer.world_size > 1:
            remedy = "give predict_dataloader a data set with rows (not an IterableDataset), or predict on one device"
            raise ValueError(f"the samples of {trainer.world_size} processes cannot be numbered: {remedy}")
        return range(self.written, self.written + rows)

    def _loader(self, trainer: L.Trainer) -> Any:
        # There is at most one: Lightning refuses several where predict_step has no dataloader_idx.
        return next(iter(CombinedLoader(trainer.predict_dataloaders, "sequential").flattened), None)

    def _settings(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        return {
            "cell": str(self.cell),
            "seed": pl_module.seed,
            "processes": trainer.world_size,
            "device": pl_module.device.type,
            "weights_sha256": _weights_sha256(pl_module),
            **origin(pl_module, trainer.datamodule),  # type: ignore[attr-defined]
            **_rows(trainer.datamodule, self._loader(trainer)),  # type: ignore[attr-defined]
        }


def _rows(data: Any, loader: Any) -> dict[str, Any]:
    """Return the identity of a loader's labels or captions, as far as it is known without reading the rows."""
    rows = getattr(loader, "dataset", None)
    whole = rows.dataset if isinstance(rows, Subset) else rows
    labels, texts = getattr(whole, "labels", None), getattr(data, "texts", None)
    # Lightning gives a loader for predictions a batch sampler, and then it has no batch size.
    batches = getattr(loader, "batch_sampler", None)
    size = getattr(loader if batches is None else batches, "batch_size", None)
    found = {"data": type(data).__name__, "batch_size": size}
    if isinstance(labels, Tensor):
        chosen = labels[torch.as_tensor(rows.indices)] if isinstance(rows, Subset) else labels
        found["labels"] = tensors_sha256({"labels": chosen})[:DIGITS]
    if texts:
        found["captions"] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:DIGITS]
    encoder = getattr(getattr(data, "encoder", None), "identity", None)
    return found | ({"encoder": encoder} if encoder else {})


def _weights_sha256(module: Any) -> str:
    """Return one hash of the average and the teacher; of sharded networks, over the hashes of all shards."""
    teacher: Teacher | None = getattr(module, "teacher", None)
    modules = [module.average, *(teacher.evaluated_modules() if teacher else [])]
    tensors = {f"{number}.{name}": value for number, part in enumerate(modules) for name, value in _state(part)}
    local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    digest = tensors_sha256(local)
    if not any(isinstance(value, DTensor) for value in tensors.values()):
        return digest
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in module.state_dict().items() if isinstance(value, Tensor)]
