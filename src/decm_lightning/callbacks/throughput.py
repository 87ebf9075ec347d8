"""Log how many images per second a run trains on."""

import time

import lightning as L
import torch

from decm_lightning.types import Batch


class Throughput(L.Callback):
    """Logs `throughput/images_per_s` over all devices, without the time of validation.

    Lightning's ThroughputMonitor waits for the GPU at every batch, and counts the work of callbacks at the end of a
    validation, such as sampling, as training. For the parts of a step, use `--trainer.profiler simple`.

    Args:
        every_n_steps: steps between two measurements, at least 1.

    Raises:
        ValueError: if every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1: got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.images = 0
        self.since = 0.0
        self.paused = 0.0
        self.read_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Log once every `every_n_steps` steps."""
        self.images += len(batch[0]) * trainer.world_size
        if trainer.global_step == self.read_at or trainer.global_step % self.every_n_steps:
            return
        pl_module.log("throughput/images_per_s", self.images / (_now(trainer) - self.since))
        self._restart(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.paused = _now(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the clock."""
        self.since += _now(trainer) - self.paused

    def _restart(self, trainer: L.Trainer) -> None:
        self.images, self.since, self.read_at = 0, _now(trainer), trainer.global_step


def _now(trainer: L.Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()
