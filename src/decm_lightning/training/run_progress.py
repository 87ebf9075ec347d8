"""The screen of a run: a summary, one progress bar over all steps, and the expected time."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from decm_lightning.progress import Progress, duration, say
from decm_lightning.training.flow_training import FlowTraining
from decm_lightning.training.run_summary import forward_flops, summary
from decm_lightning.training.schedule import run_length
from decm_lightning.types import Batch

WARMUP, TIMED = 2, 5
"""Steps before the clock starts, and the steps that it measures."""


class RunProgress(ProgressBar):
    """Shows what a fit trains and its cost, one bar over all steps with the losses, and the expected time.

    The first process writes all of it to standard error. Without a terminal the bar is a line every 30 seconds. The
    losses are only read when they are shown, so that the device is not waited for at each step.

    Args:
        predicting: the name of the bar over the batches of a prediction.
    """

    def __init__(self, predicting: str = "predicting") -> None:
        super().__init__()
        self.predicting = predicting
        # A process without a console has no streams.
        self.is_enabled = sys.stderr is not None
        self.bar: Progress | None = None
        self.reading: Progress | None = None
        self.flops: int | None = None
        self.since = 0.0

    def disable(self) -> None:
        """Show nothing, as in all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show everything."""
        self.is_enabled = True

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Count the operations of the network before a strategy wraps or shards it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.is_enabled:
            self.flops = forward_flops(pl_module.network, pl_module.network.example())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Write the summary before the first batch, and open the bar."""
        if not self.is_enabled or self.bar is not None:
            return
        say(summary(trainer, pl_module, len(batch[0]), self.flops))
        first = trainer.global_step
        self.bar = Progress(desc="training", total=run_length(trainer), initial=first, note=lambda: _losses(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count optimizer steps, and write once how long the run will take."""
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        self.bar.update(trainer.global_step - self.bar.n)
        done, total = self.bar.n - self.bar.initial, self.bar.total
        if done == WARMUP:
            self.since = time.perf_counter()
        elif done == WARMUP + TIMED and total is not None:
            seconds = (time.perf_counter() - self.since) / TIMED
            left = duration(seconds * (total - self.bar.n))
            say(f"expected: {left} ({seconds:.2g} s per step), evaluation not included")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Show how many batches are done, if that takes longer than a second."""
        if not self.is_enabled or trainer.sanity_checking:
            return
        if self.reading is None:
            stage = "predict" if trainer.predicting else "test" if trainer.testing else "val"
            total = getattr(trainer, f"num_{stage}_batches")[dataloader_idx]
            head = self.predicting if trainer.predicting else "reading real images"
            self.reading = Progress(desc=head, total=total, unit="batch", delay=1)
        self.reading.update()
        # Samples are generated after the last batch, with their own bar.
        if self.reading.n == self.reading.total:
            self.reading.close()
            self.reading = None

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bars."""
        for bar in (self.reading, self.bar):
            if bar is not None:
                bar.close()
        self.bar = self.reading = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bars, because Lightning does not call teardown after an error."""
        self.teardown(trainer, pl_module, "")


def _losses(module: FlowTraining) -> str:
    """Return the sum of the active losses, and each of them by its initials."""
    values = {name: float(term.value.detach()) for name, term in module.terms.items()}
    if not values:
        return ""
    initials = ["".join(word[0] for word in name.split("_")) for name in values]
    parts = ", ".join(f"{short} {value:.3g}" for short, value in zip(initials, values.values(), strict=True))
    return f"loss {sum(values.values()):.3g}" + (f" ({parts})" if len(values) > 1 else "")
