"""Measures samples against real images while training, and writes the table of quality when testing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import nn
from tqdm.auto import tqdm

from decm_lightning.callbacks.cells import Cell, check, draw, draw_grid, evaluations
from decm_lightning.callbacks.table import Row, Table
from decm_lightning.metrics import Quality
from decm_lightning.metrics.quality import KID_SUBSET_SIZE, KID_SUBSETS
from decm_lightning.pictures import to_uint8

COLUMNS = 10


class Evaluation(L.Callback):
    """The Fréchet distance (fd) and kernel distance (kid) of every cell "model/sampler/steps" on a feature network.

    Validation logs `fd/<cell>` and `kid/<cell>`, such as `fd/student/mix/2`. Testing logs `test/fd/<cell>` and
    `test/kid/<cell>`, and writes quality.md, quality.json and samples.png into the log folder. Real images are those
    of the validation or test loader, taken in once. Sample number i has the label i mod num_classes of the datamodule,
    and starts from the same noise in every cell and every validation. Compare distances of equal numbers of images
    only. The sanity check before training is left out.

    Args:
        features: frozen; uint8 images to (b, num_features), such as metrics.DigitsFeatures.
        cells: what is measured in validation.
        test_cells: what is measured in testing; None for `cells`.
        samples: samples a cell in validation, over all processes, at least 2.
        test_samples: the same in testing; None for `samples`.
        batch_size: samples drawn at once on each device, at least 1.
        seed: seed of the noise, and of KID's subsets.

    Raises:
        ValueError: if a cell is not of that form or a number is too small.
    """

    def __init__(
        self,
        features: nn.Module,
        cells: list[str],
        test_cells: list[str] | None = None,
        samples: int = 2000,
        test_samples: int | None = None,
        batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        self.features = features
        self.cells = [Cell.parse(text) for text in cells]
        self.test_cells = self.cells if test_cells is None else [Cell.parse(text) for text in test_cells]
        self.samples = samples
        self.test_samples = samples if test_samples is None else test_samples
        self.batch_size = batch_size
        self.seed = seed
        if min(self.samples, self.test_samples) < 2:
            raise ValueError(f"samples must be at least 2: got {min(self.samples, self.test_samples)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin without real images, after a check that the cells can be drawn.

        Raises:
            ValueError: if the datamodule has no num_classes, or the module not a cell's model.
        """
        if stage == "predict":
            return
        self.num_classes = check([*self.cells, *self.test_cells], trainer, pl_module)
        self.quality = Quality(self.features, self.seed)
        self.has_real = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to end in silence where nothing was measured: Lightning skips an empty loader with all its hooks.

        Raises:
            ValueError: if `validate` or `test` had no images.
        """
        if stage in ("validate", "test"):
            self._check_real(self.has_real)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to where the module computes."""
        self.quality.to(pl_module.device)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to where the module computes."""
        self.quality.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in the real images, the first time."""
        if not (self.has_real or trainer.sanity_checking):
            self.quality.real(to_uint8(batch[0]))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in the real images."""
        self.quality.real(to_uint8(batch[0]))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the distances of every cell.

        Raises:
            ValueError: if there were no real images.
            NonFiniteError: if a sample is NaN or infinite.
        """
        if trainer.sanity_checking:
            return
        for cell, distances in self._measure(trainer, pl_module, self.cells, self.samples).items():
            for name, value in distances.items():
                pl_module.log(f"{name}/{cell}", value, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the distances of every cell, write the table and the samples, and print the table.

        Raises:
            ValueError: if there were no real images.
            NonFiniteError: if a sample is NaN or infinite.
        """
        measured = self._measure(trainer, pl_module, self.test_cells, self.test_samples)
        for cell, distances in measured.items():
            for name, value in distances.items():
                pl_module.log(f"test/{name}/{cell}", value, sync_dist=True)
        # What follows up to the last lines is for all processes: sharded networks and log_dir speak to each other.
        rows = [Row(cell, evaluations(pl_module, cell, self.num_classes), **measured[cell]) for cell in measured]
        table = Table(self.quality.name, self._protocol(self.test_samples), rows)
        images = draw_grid(pl_module, list(measured), COLUMNS, self.num_classes, self.seed)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            files = table.write(folder, images)
            print(f"\n{table.markdown()}\nwrote {', '.join(map(str, files))}")

    def _measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, cells: Sequence[Cell], samples: int
    ) -> dict[Cell, dict[str, float]]:
        self.has_real = self.quality.counts()[0] > 0
        self._check_real(self.has_real)
        parts = self._parts(trainer, samples)
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
        measured = {}
        with tqdm(total=len(cells) * sum(map(len, parts)), unit="image", leave=False, disable=hidden) as bar:
            for cell in cells:
                bar.set_description(str(cell))
                self.quality.reset_generated()
                for rows in parts:
                    self.quality.generated(draw(pl_module, cell, rows, self.num_classes, self.seed))
                    bar.update(len(rows))
                measured[cell] = self.quality.compute()
        return measured

    def _parts(self, trainer: L.Trainer, samples: int) -> list[list[int]]:
        # Every process draws as many batches as the others: the forward pass of a sharded network is common to all.
        world = trainer.world_size
        batches = math.ceil(math.ceil(samples / world) / self.batch_size)
        return [part.tolist() for part in np.array_split(np.arange(trainer.global_rank, samples, world), batches)]

    def _check_real(self, has_real: bool) -> None:
        if not has_real:
            raise ValueError("no real images to measure against: the validation or test loader is empty")

    def _protocol(self, samples: int) -> dict[str, str | int]:
        real, generated = self.quality.counts()
        return {
            "feature network": self.quality.name,
            "real images": real,
            "generated images": generated,
            "labels": f"sample i has the label i mod {self.num_classes}",
            "pixels": "round(127.5 (x + 1)) clamped to 0..255",
            "seed": self.seed,
            "batch size": self.batch_size,
            "kid": f"mean over {KID_SUBSETS} subsets of {min(KID_SUBSET_SIZE, real, generated)}, not times 1,000",
            "evaluations": "passes of a network for one sample, guidance included",
        }
