"""Stop a training run that cannot succeed, with an error about its data, schedule, losses or gradients."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from decm_lightning.data.fit import check_fit
from decm_lightning.data.protocol import EvaluationData, LacksSamples, NamesRows
from decm_lightning.errors import NonFiniteError
from decm_lightning.gradients import loss_module, total_norm
from decm_lightning.training.schedule import run_length
from decm_lightning.types import Batch

NAMED = 3
"""The largest number of rows that an error names; the rest are counted."""


class TrainingChecks(L.Callback):
    """Compares data with network and schedule with run, and stops at a NaN or infinite loss or gradient.

    It also computes the norm of all gradients once per step, and stores it as the module's `gradient_norm`.
    """

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check that data and network have the same number of classes, and that losses that read data have data.

        Raises:
            ValueError: naming both numbers, or the losses.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        readers = pl_module.data_readers() if stage == "fit" and isinstance(data, LacksSamples) else []
        if readers:
            remedy = "use an objective on the noise edge from t = 0, such as losses.free_flow, or data with samples"
            raise ValueError(f"{type(data).__name__} has no samples, which {', '.join(readers)} read: {remedy}")
        check_fit(pl_module.network, EvaluationData.of(data).num_classes)

    def check_schedule(self, trainer: L.Trainer) -> None:
        """Refuse a schedule that ends before the run, and warn if the run ends before the schedule.

        Raises:
            ValueError: naming both numbers of steps.
        """
        configs = trainer.lr_scheduler_configs
        end = getattr(configs[0].scheduler, "total_steps", None) if configs else None
        steps = run_length(trainer)
        if end is None or steps is None:
            return
        both = f"the lr_scheduler has {end} steps and the run {steps}"
        if steps > end:
            raise ValueError(f"{both}: set its total_steps to {steps}, or trainer.max_steps to {end}")
        if steps < end:
            rank_zero_warn(f"{both}, so the schedule does not finish: set its total_steps to {steps}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """Refuse samples whose shape differs from the network's."""
        check_fit(pl_module.network, shape=tuple(batch[0].shape[1:]))
        self.x_1, self.batch_idx = batch[0], batch_idx

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Stop if a loss is not finite.

        Raises:
            NonFiniteError: naming the data's non-finite rows; without such rows, naming the loss, the step, the batch
                and the origin of the first NaN or infinity.
        """
        module = loss_module(pl_module)
        values = {name: term.value for name, term in module.terms.items()}
        if torch.stack(list(values.values())).isfinite().all():
            return
        self._refuse_bad_rows(trainer)
        bad = ", ".join(f"loss/{name} = {value.item()}" for name, value in values.items() if not value.isfinite())
        raise NonFiniteError(self._stopped(bad, trainer) + module.origin())

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Stop if the gradient is not finite, before the weights are updated.

        With a gradient scaler (16-mixed) this is routine while its scale is above 1: it skips the step and halves it.

        Raises:
            NonFiniteError: naming the data's non-finite rows, or the parameters, the losses, the step and the batch.
        """
        module = loss_module(pl_module)
        gradients = {name: p.grad for name, p in module.network.named_parameters() if p.grad is not None}
        module.gradient_norm = total_norm(gradients.values())
        if module.gradient_norm.isfinite():
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        self._refuse_bad_rows(trainer)
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        losses = ", ".join(f"loss/{name} = {term.value.item():.4g}" for name, term in module.terms.items())
        what = f"the gradient of {bad[0] if bad else 'all parameters together'}{more} (losses: {losses})"
        raise NonFiniteError(self._stopped(what, trainer))

    def _refuse_bad_rows(self, trainer: L.Trainer) -> None:
        """Raise an error that names the data's non-finite rows, if there are any."""
        rows = self.x_1.isfinite().flatten(1).all(1).logical_not().nonzero().flatten().tolist()
        if not rows:
            return
        data, number = trainer.datamodule, self.batch_idx  # type: ignore[attr-defined]
        named = isinstance(data, NamesRows)
        places = [data.place(number, row) if named else f"row {row} of the batch" for row in rows[:NAMED]]
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        remedy = "remove them or create them again (decm validate-data lists all such latents)"
        where = f"batch {number} of epoch {trainer.current_epoch}"
        raise NonFiniteError(f"NaN or infinite in the data: {', '.join(places)}{more}, in {where}; {remedy}")

    def _stopped(self, what: str, trainer: L.Trainer) -> str:
        where = f"at step {trainer.global_step}, batch {self.batch_idx} of epoch {trainer.current_epoch}"
        return f"{what} is not finite {where}: lower the learning rate, clip gradients, or check the data"
