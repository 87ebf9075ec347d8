"""Measures samples against real images while training, and writes the table of quality when testing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from tqdm.auto import tqdm

from decm_lightning.conditions import select
from decm_lightning.evaluation.generator import Drawing, LabelLaw
from decm_lightning.evaluation.protocol import protocol
from decm_lightning.evaluation.spec import Cell
from decm_lightning.evaluation.table import Row, Table
from decm_lightning.even_split import count_own, split_evenly
from decm_lightning.image_writer import check_plots, short
from decm_lightning.metrics import Quality, reference
from decm_lightning.metrics.feature_metrics import Prompts
from decm_lightning.types import Batch

COLUMNS = 10


class Evaluation(L.Callback):
    """The quality of every cell "model/sampler/steps", measured on one or several feature networks.

    Validation logs `<column>/<cell>`, such as `fd/student/mix/2`, for the columns that are cheap: Fréchet distance and
    kernel distance. Testing logs `test/<column>/<cell>` for all of them, and writes quality.md, quality.json and
    samples.png into the log folder, with the protocol. What the columns are is said by the feature networks: fd and
    kid, or with metrics.InceptionFeatures fid, sfid, inception_score, precision, recall and kid. Beside them may stand
    what compares samples with their captions: metrics.CaptionProbe, metrics.CLIP and others. Real images are those
    of the validation or test loader, or of `reference`, taken in once. Sample number i has the same label and starts
    from the same noise in every cell and every validation. Compare distances of equal numbers of images only. The
    sanity check before training is left out.

    Args:
        features: one feature network or several, such as metrics.DigitsFeatures or metrics.InceptionFeatures.
        cells: what is measured in validation, at least one.
        test_cells: what is measured in testing, at least one; None for `cells`.
        samples: samples a cell in validation, over all processes, at least 2.
        test_samples: the same in testing; None for what the feature network asks for (50,000 with Inception), or else
            `samples`.
        batch_size: samples drawn at once on each device, at least 1.
        seed: seed of noise, labels, and what the metrics draw.
        reference: an .npz file or a folder of real images (metrics.reference.read); None for the loader's images.
        labels: "balanced": sample i has the label i mod num_classes; "uniform": drawn by the seed. A datamodule with a
            method `condition(rows, seed)` gives the conditions itself.

    Raises:
        ValueError: if there is no cell, one is not of that form, or a number is too small.
    """

    def __init__(
        self,
        features: nn.Module | list[nn.Module],
        cells: list[str],
        test_cells: list[str] | None = None,
        samples: int = 2000,
        test_samples: int | None = None,
        batch_size: int = 500,
        seed: int = 0,
        reference: str | None = None,
        labels: LabelLaw = "balanced",
    ) -> None:
        self.features = list(features) if isinstance(features, list) else [features]
        self.cells = [Cell.parse(text) for text in cells]
        self.test_cells = self.cells if test_cells is None else [Cell.parse(text) for text in test_cells]
        self.samples = samples
        asked = max((getattr(network, "samples", 0) for network in self.features), default=0)
        self.test_samples = (asked or samples) if test_samples is None else test_samples
        self.batch_size = batch_size
        self.seed = seed
        self.reference = reference
        self.labels = labels
        self.qualities: list[Quality] = []
        if not self.features:
            raise ValueError("features must be at least one network: got none")
        if not (self.cells and self.test_cells):
            raise ValueError("cells and test_cells must name at least one model/sampler/steps each: got none")
        if labels not in ("balanced", "uniform"):
            raise ValueError(f"labels must be balanced or uniform: got {labels!r}")
        if min(self.samples, self.test_samples) < 2:
            raise ValueError(f"samples must be at least 2: got {min(self.samples, self.test_samples)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin without real images, after a check that the cells can be drawn.

        Raises:
            FileNotFoundError: if there is no reference.
            ImportError: if a test will write samples.png and matplotlib is not installed.
            ValueError: if the datamodule has no conditions, the module not a cell's model, the reference does not serve
                the feature networks, or two of those have a column of the same name.
        """
        if stage == "predict":
            return
        if stage == "test":
            check_plots()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.drawing = Drawing(pl_module, data, self.labels, self.seed)
        self.drawing.check([*self.cells, *self.test_cells])
        self.real = None if self.reference is None else reference.read(self.reference)
        self.qualities = [Quality(network, self.seed, self.real, stage != "test") for network in self.features]
        columns = [column for quality in self.qualities for column in quality.columns]
        if twice := [column for column in columns if columns.count(column) > 1]:
            raise ValueError(f"two feature networks have a column {twice[0]!r}: measure them in two runs")
        self.has_real = False
        self.has_measured = False
        self.rows_seen = 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to end in silence where nothing was measured: Lightning skips an empty loader with all its hooks.

        Raises:
            ValueError: if `validate` or `test` had no images.
        """
        if stage in ("validate", "test") and not self.has_measured:
            cause = "the validation or test loader is empty (that of latents is, without a VAE)"
            raise ValueError(f"nothing was measured, no real images to measure against: {cause}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to where the module computes, and take in the reference, the first time."""
        self._start(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move to where the module computes, and take in the reference."""
        self._start(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Free the accelerator for training."""
        self._release()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Free the accelerator for what comes next."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free the accelerator for what comes next."""
        self._release()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in the real images, the first time, if there is no reference."""
        if not (self.has_real or trainer.sanity_checking):
            self._take_in_own(trainer.val_dataloaders, batch, batch_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in the real images, if there is no reference."""
        if not self.has_real:
            self._take_in_own(trainer.test_dataloaders, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is cheap of every cell.

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
        """
        if trainer.sanity_checking:
            return
        for cell, values in self._measure(trainer, self.cells, self.samples).items():
            for name, value in values.items():
                pl_module.log(f"{name}/{cell}", value, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log all of every cell, write the table and the samples, and print the table.

        Raises:
            NonFiniteError: if a sample is NaN or infinite.
        """
        measured = self._measure(trainer, self.test_cells, self.test_samples)
        for cell, values in measured.items():
            for name, value in values.items():
                pl_module.log(f"test/{name}/{cell}", value, sync_dist=True)
        # What follows up to the last lines is for all processes: sharded networks and log_dir speak to each other.
        usages = {cell: self.drawing.usage(cell) for cell in measured}
        rows = [Row(cell, usages[cell].nfe, values) for cell, values in measured.items()]
        # The heading begins with the distance.
        names = " and ".join(
            quality.name for quality in sorted(self.qualities, key=lambda quality: -quality.has_distance)
        )
        followed = protocol(self.drawing, self.qualities, self.real, self.test_samples, self.batch_size, usages)
        images = self.drawing.grid(list(measured), COLUMNS)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            captions = [short(text) for text in self.drawing.texts(range(COLUMNS)) or ()]
            table = Table(names, followed, rows, captions)
            files = table.write(folder, images)
            print(f"\n{table.markdown()}\nwrote {', '.join(map(str, files))}")

    def _start(self, trainer: L.Trainer) -> None:
        for quality in self.qualities:
            quality.to(self.drawing.module.device)
        if trainer.sanity_checking:
            return
        for quality in self.qualities:
            quality.prepare(self.drawing.data, self.drawing.read)
        if self.real is None or self.has_real:
            return
        self.has_real = True
        images = self.real.images
        if images is None or not any(quality.needs_images for quality in self.qualities):
            return
        parts = split_evenly(len(images), self.batch_size, trainer.global_rank, trainer.world_size)
        with self._bar(trainer, sum(map(len, parts))) as bar:
            bar.set_description("reference")
            for batch in images.batches(parts):
                self._take_in(batch, Prompts())
                bar.update(len(batch))

    def _release(self) -> None:
        """Move feature networks, statistics and the decoder off the accelerator."""
        for quality in self.qualities:
            quality.to(torch.device("cpu"))
        if self.qualities:
            self.drawing.release()

    def _take_in_own(self, loaders: Any, batch: Batch, batch_idx: int) -> None:
        """Take in the rows of a batch that no other process has."""
        x_1, condition = batch[0], batch[1]
        # There is one loader: Lightning refuses several where validation_step has no dataloader_idx.
        sampler = getattr(CombinedLoader(loaders, "sequential").flattened[0], "sampler", None)
        own = slice(count_own(sampler, batch_idx, self.rows_seen, len(x_1)))
        self.rows_seen += len(x_1)
        self._take_in(self.drawing.pictures(x_1)[own], Prompts(select(condition, own)))

    def _take_in(self, images: Tensor, prompts: Prompts) -> None:
        for quality in self.qualities:
            quality.real(images, prompts)

    def _measure(self, trainer: L.Trainer, cells: Sequence[Cell], samples: int) -> dict[Cell, dict[str, float]]:
        self.has_real = self.has_measured = True
        parts = split_evenly(samples, self.batch_size, trainer.global_rank, trainer.world_size)
        wanted = any(quality.wants_prompts for quality in self.qualities)
        measured = {}
        with self._bar(trainer, len(cells) * sum(map(len, parts))) as bar:
            for cell in cells:
                bar.set_description(str(cell))
                for quality in self.qualities:
                    quality.reset_generated()
                for rows in parts:
                    # Where there are fewer samples than processes, sharded networks still need every process.
                    images = self.drawing.draw(cell, rows or range(1))[: len(rows)]
                    prompts = self.drawing.prompts(rows) if wanted else Prompts()
                    for quality in self.qualities:
                        quality.generated(images, prompts)
                    bar.update(len(rows))
                measured[cell] = {k: value for quality in self.qualities for k, value in quality.compute().items()}
        return measured

    def _bar(self, trainer: L.Trainer, total: int) -> tqdm:
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
        return tqdm(total=total, unit="image", leave=False, disable=hidden)
