"""How fast training runs, and where a step's time goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor


class Throughput(L.Callback):
    """Logs `throughput/images_per_s` over all devices, and the share of a step spent in its parts.

    The parts are `throughput/teacher` (its velocities), `throughput/derivative` (the student's pass and its
    derivatives) and `throughput/backward`, each in [0, 1] of the wall time; the rest is loading, the optimizer and
    logging. Validation is left out. On a GPU the parts are timed by events, which wait for nothing until they are read.

    Args:
        every_n_steps: steps between two readings, at least 1.

    Raises:
        ValueError: if every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1: got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.device = torch.device("cpu")
        self.images = 0
        self.since = 0.0
        self.paused = 0.0
        self.read_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen to the module's phases."""
        self.device = pl_module.device
        pl_module.phase = self.phase
        self._restart(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop listening."""
        pl_module.phase = nullcontext

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop listening."""
        pl_module.phase = nullcontext

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens within."""
        start = self._mark()
        try:
            yield
        finally:
            self.marks[name].append((start, self._mark()))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Mark the start of the backward pass."""
        self.marks["backward"].append((self._mark(), None))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark its end."""
        start, _ = self.marks["backward"].pop()
        self.marks["backward"].append((start, self._mark()))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log once every `every_n_steps` steps."""
        self.images += len(batch[0]) * trainer.world_size
        if trainer.global_step == self.read_at or trainer.global_step % self.every_n_steps:
            return
        elapsed = self._now() - self.since
        pl_module.log("throughput/images_per_s", self.images / elapsed)
        for name, marks in self.marks.items():
            pl_module.log(f"throughput/{name}", sum(self._seconds(*mark) for mark in marks) / elapsed)
        self._restart(trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self.paused = self._now()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock go on."""
        self.since += self._now() - self.paused

    def _restart(self, step: int) -> None:
        self.marks.clear()
        self.images = 0
        self.since = self._now()
        self.read_at = step

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
