"""Writes what `decm predict` draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from decm_lightning.callbacks.cells import Cell
from decm_lightning.callbacks.drawing import pictures
from decm_lightning.pictures import save_files


class SampleWriter(BasePredictionWriter):
    """Writes one PNG for each label or other condition of the prediction loader, numbered in its order.

    Args:
        folder: where to, made if need be.
        cell: what to draw, "model/sampler/steps", such as "student/mix/2".

    Raises:
        ValueError: if the cell is not of that form.
    """

    def __init__(self, folder: str, cell: str = "student/mix/1") -> None:
        super().__init__("batch")
        self.folder = Path(folder)
        self.cell = Cell.parse(cell)
        self.written = 0

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the module what to draw."""
        super().on_predict_start(trainer, pl_module)
        pl_module.draws = self.cell  # type: ignore[assignment]

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
        """Write one batch."""
        x, condition = prediction
        # Every process writes its own numbers: rank, then every world_size-th.
        first = self.written * trainer.world_size + trainer.global_rank * len(x)
        labels = condition if isinstance(condition, torch.Tensor) and condition.ndim == 1 else None
        images = pictures(x, trainer.datamodule)  # type: ignore[attr-defined]
        save_files(images, labels, self.folder, first)
        self.written += len(x)
