"""Create a run's optimizer and schedule, and apply a config's settings to those of a checkpoint."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from decm_lightning.training.schedule import WarmupCosine


class Recipe:
    """Creates the optimizer and its per-step schedule.

    Args:
        optimizer: creates the optimizer from the parameters.
        lr_scheduler: creates a per-step schedule from the optimizer.

    Attributes:
        settings: the initial settings of the optimizer and the schedule; empty before they are created.
        steps: the length of the run, None if unknown.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable) -> None:
        self.make_optimizer = optimizer
        self.make_schedule = lr_scheduler
        self.groups: list[dict[str, Any]] = []
        self.settings: dict[str, dict[str, Any]] = {}
        self.steps: int | None = None

    def make(self, parameters: Iterable[nn.Parameter]) -> Any:
        """Return the optimizer and schedule in the form of a LightningModule's configure_optimizers."""
        optimizer = self.make_optimizer(parameters)
        self.groups = [
            {key: copy.copy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        groups = self.groups[0] if len(self.groups) == 1 else {"groups": self.groups}
        self.settings = {"optimizer": {"class": type(optimizer).__name__} | groups}
        try:
            schedule = self.make_schedule(optimizer)
        except ZeroDivisionError:
            raise ValueError("a phase of the lr_scheduler has no steps: change its total_steps or pct_start") from None
        if isinstance(schedule, ReduceLROnPlateau):
            remedy = "use one that depends on the step alone, such as CosineAnnealingLR"
            raise ValueError(f"the lr_scheduler ReduceLROnPlateau follows a metric: {remedy}")
        self.settings["lr_scheduler"] = {"class": type(schedule).__name__, **schedule.state_dict()}
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def set_length(self, trainer: L.Trainer, steps: int | None) -> None:
        """Set the length of the run in the schedule, if it depends on the length."""
        self.steps = steps
        schedule = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
        if isinstance(schedule, WarmupCosine):
            schedule.set_length(steps)
            self.settings["lr_scheduler"]["steps"] = steps

    def apply(self, trainer: L.Trainer) -> None:
        """Apply the config's settings to a resumed run, whose optimizer and schedule come from the checkpoint.

        The optimizer keeps its state, such as Adam's moments. The schedule is created again and advanced to the
        current step.
        """
        optimizer = trainer.optimizers[0]
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            group.pop("initial_lr", None)
            group.update(copy.deepcopy(settings))
        with warnings.catch_warnings():
            # The optimizer took these steps before the checkpoint was saved.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            schedule = self.make_schedule(optimizer)
            for _ in range(trainer.global_step):
                schedule.step()
        trainer.lr_scheduler_configs[0].scheduler = schedule
        self.set_length(trainer, self.steps)
