"""Save the last step of a run that ends at its limits, by SIGTERM or by Ctrl-C."""

import logging
import re
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from decm_lightning.signals import end_at_signals

log = logging.getLogger(__name__)
OF_LATER_RUN = re.compile(r"-v\d+$")
"""The suffix that ModelCheckpoint adds to the name of a file that already exists."""


class Stopped(SIGTERMException):
    """Raised when a signal ends the run. The process exits with 128 + the signal's number, as shells expect.

    Args:
        signum: SIGTERM or SIGINT.
        is_spawned: whether another process of the run started this one. It then exits with 0, because otherwise
            Lightning would kill the process that started it.
    """

    def __init__(self, signum: int, is_spawned: bool) -> None:
        super().__init__(0 if is_spawned else 128 + signum)
        self.signum = signum


class LastStep(L.Callback):
    """Saves the last optimizer step when a fit ends, and ends a fit cleanly at SIGTERM and Ctrl-C.

    When a fit ends, each ModelCheckpoint with `save_last` saves its last step in `last.ckpt`. If none has `save_last`,
    the first ModelCheckpoint does. A signal takes effect between two batches, or immediately while a single process
    validates. Then the step is saved and `Stopped` is raised in all processes, even if only one received the signal.
    Before the first batch SIGTERM ends the process immediately. A second Ctrl-C stops immediately without saving. A job
    that SLURM will requeue is also saved between two batches.

    Attributes:
        received: the first signal that this process received; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self.requeue: Any = None
        self.has_trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let SIGTERM end runs with nothing to save: a fit before its first batch, a test, a prediction."""
        end_at_signals(trainer)
        self.has_trained = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's signal handlers, which act in the middle of a step, where nothing can be saved."""
        self.received, self.has_trained = 0, True
        self.trainer = trainer
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        requeue = getattr(environment, "requeue_signal", None) if getattr(environment, "auto_requeue", False) else None
        if requeue is not None:
            self.requeue = (requeue, signal.getsignal(requeue))
            signal.signal(requeue, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        # Before each batch Lightning broadcasts whether the first process received SIGTERM: replaced for all signals.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._agree  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a single process received a signal. Several processes agree before the next batch."""
        if trainer.world_size == 1:
            self._stop(self.received)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if a signal was received, because validation may take hours."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._agree()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step."""
        for file in self._save(trainer):
            if trainer.is_global_zero and OF_LATER_RUN.search(file.stem):
                earlier = f"{file.parent} has a last.ckpt of an earlier run"
                log.warning("saved the last step of this run to %s, because %s", file, earlier)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if nothing was trained, as when a finished run is resumed."""
        if not self.has_trained and trainer.is_global_zero:
            limits = f"trainer.max_steps is {trainer.max_steps} and trainer.max_epochs {trainer.max_epochs}"
            log.warning("nothing was trained: the run is at step %d, and %s", trainer.global_step, limits)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last step if a signal ended the run. After an error nothing is saved."""
        if not isinstance(exception, Stopped):
            return
        files = self._save(trainer)
        if trainer.is_global_zero:
            name, step = signal.Signals(exception.signum).name, trainer.global_step
            resume = f"resume with --ckpt_path {files[0]}" if files else "not saved: the trainer has no ModelCheckpoint"
            log.warning("stopped by %s after step %d: %s", name, step, resume)

    def _on_signal(self, signum: int, frame: Any) -> None:
        trainer = self.trainer
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received:
            # The step may be in the middle of being saved.
            return
        self.received = signum
        if trainer.validating and trainer.world_size == 1:
            self._stop(signum)
        elif trainer.is_global_zero:
            log.warning("%s: stopping after this step (Ctrl-C again: at once)", signal.Signals(signum).name)

    def _agree(self) -> None:
        received = self.received
        if self.trainer.world_size > 1:
            shared = torch.tensor(received, device=self.trainer.strategy.root_device)
            # A scheduler may signal only the processes of one machine.
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            received = int(shared)
        self._stop(received)

    def _stop(self, signum: int) -> None:
        if not signum:
            return
        if self.requeue is not None and signum == self.requeue[0]:
            self.received = 0
            self.requeue[1](signum, None)
            return
        environment = self.trainer._accelerator_connector.cluster_environment
        is_spawned = self.trainer.local_rank > 0 and not environment.creates_processes_externally
        raise Stopped(signum, is_spawned)

    def _save(self, trainer: L.Trainer) -> list[Path]:
        """Save the last step where it is missing, in all processes, and return its files."""
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if getattr(trainer, "fast_dev_run", False) or not callbacks or not trainer.global_step:
            return []
        saving = [callback for callback in callbacks if callback.save_last] or callbacks[:1]
        for callback in saving:
            if Path(callback._last_checkpoint_saved).stem == callback.CHECKPOINT_NAME_LAST:
                # With the filename "last" this is its own file, which it may replace.
                callback.last_model_path = callback._last_checkpoint_saved
            if callback._last_global_step_saved == trainer.global_step and (
                callback.save_last == "link" or callback._last_checkpoint_saved == callback.last_model_path != ""
            ):
                continue
            # Always a file, because a link would point to an earlier step.
            save_last, callback.save_last = callback.save_last, True
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
            callback.save_last = save_last
        return [Path(callback.last_model_path) for callback in saving]
