"""The length of a run, and a learning-rate schedule that adapts to it."""

from math import ceil, cos, inf, pi

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

FEWEST, MOST = 10, 1000
"""Bounds of the warm-up in steps. Adam's first steps move each weight by the full rate, even for tiny gradients."""


def run_length(trainer: L.Trainer) -> int | None:
    """Return the number of optimizer steps of a run, None if it has no limit of steps or epochs.

    Call this in `on_train_start`, when the data loader exists. `trainer.estimated_stepping_batches` would build the
    loader in `configure_optimizers`, before the position of a resumed run is known. It also ignores accumulation by
    epochs.
    """
    lengths = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is not None and epochs >= 0 and batches < inf:
        schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
        factors = [
            schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches
            for epoch in range(epochs)
        ]
        lengths.append(sum(ceil(batches / factor) for factor in factors))
    return min(lengths, default=None)


class WarmupCosine(LRScheduler):
    """A linear warm-up followed by a cosine decay over the whole run. The training module sets the length.

        rate(k) = rate * min(1, (k + 1) / (w + 1)) * (floor + (1 - floor) (1 + cos(pi p)) / 2) at step k

    p goes from 0 at step w to 1 at the end of the run. The rate depends only on the step. If the run has no
    known length, w is 1,000 and p stays 0.

    Args:
        optimizer: the optimizer.
        warmup: w as a fraction of the run, in [0, 1); w is at least 10 steps (a quarter of runs below 40 steps) and at
            most 1,000. 0 for no warm-up.
        floor: final rate as a fraction of the optimizer's rate, in [0, 1]; 1 for a constant rate after the warm-up.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, floor: float = 0.1) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be in [0, 1): got {warmup}")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must be in [0, 1]: got {floor}")
        self.warmup = warmup
        self.floor = floor
        self.steps: int | None = None
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Return rate(step) / rate."""
        length = self.steps
        warmup = 0
        if self.warmup:
            few = MOST if length is None else max(self.warmup * length, min(FEWEST, length / 4))
            warmup = min(MOST, round(few))
        progress = 0.0 if length is None else min(1.0, max(0, step - warmup) / max(1, length - warmup))
        return min(1.0, (step + 1) / (warmup + 1)) * (self.floor + (1 - self.floor) * (1 + cos(pi * progress)) / 2)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each parameter group at the current step."""
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]

    def set_length(self, steps: int | None) -> None:
        """Set the length of the run, and the rates of the current step."""
        self.steps = steps
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
