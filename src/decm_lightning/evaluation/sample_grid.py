"""Log samples to TensorBoard during training, and write them to samples.png."""

from pathlib import Path
from typing import Any

import lightning as L
from einops import rearrange
from lightning.pytorch.loggers import TensorBoardLogger

from decm_lightning.errors import check_at_least
from decm_lightning.evaluation.generator import SampleGenerator
from decm_lightning.evaluation.spec import SamplingSpec
from decm_lightning.image_writer import save_grid

SCALED_TO = 64
"""Smaller images are enlarged to about this number of pixels in samples.png."""


class SampleGrid(L.Callback):
    """Logs a grid of samples to TensorBoard as `samples`: one row per spec, one column per class or condition.

    The latest grid is also in samples.png in the log folder. The noise is fixed, so the grids show how each sample
    improves. Without a TensorBoard logger nothing is logged.

    Args:
        specs: the rows, each "model/sampler/steps", such as "student/mix/2".
        every_n_steps: optimizer steps between two grids, at least 1.
        columns: the largest number of classes or conditions, at least 1.
        seed: seed of the noise.

    Raises:
        ValueError: if a spec is invalid or a number is too small.
    """

    def __init__(self, specs: list[str], every_n_steps: int = 1000, columns: int = 10, seed: int = 0) -> None:
        self.specs = [SamplingSpec.parse(text) for text in specs]
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.seed = seed
        self.last_step = -1
        check_at_least(1, every_n_steps=every_n_steps, columns=columns)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the specs can be generated."""
        if stage == "fit":
            self.generator = SampleGenerator(pl_module, trainer.datamodule, seed=self.seed)  # type: ignore[attr-defined]
            self.generator.check(self.specs)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count optimizer steps from the start of this run."""
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a grid every `every_n_steps` steps, once per step even if gradients are accumulated."""
        # Other processes than the first have dummy experiments, which claim to have every method.
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        step = trainer.global_step
        if not loggers or step == self.last_step or step % self.every_n_steps:
            return
        self.last_step = step
        try:
            images = self.generator.grid(self.specs, self.columns)
        finally:
            self.generator.data.release()
        grid = rearrange(images, "rows columns c h w -> c (rows h) (columns w)")
        for logger in loggers:
            logger.experiment.add_image("samples", grid, step)
            if trainer.is_global_zero:
                file = Path(logger.log_dir) / "samples.png"
                save_grid(images.flatten(0, 1), images.shape[1], SCALED_TO // images.shape[-1] or 1, file)
