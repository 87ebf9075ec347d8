"""The last step of a run is saved, however the run ends: at its limits, by SIGTERM, or by Ctrl-C."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class Stopped(SIGTERMException):
    """A signal has ended the run; the process exits with 128 + the signal's number, as shells expect.

    Args:
        signum: SIGTERM or SIGINT.
        is_spawned: whether another process of the run has started this one. It then exits with 0, or Lightning would
            kill that process.
    """

    def __init__(self, signum: int, is_spawned: bool) -> None:
        super().__init__(0 if is_spawned else 128 + signum)
        self.signum = signum


class LastStep(L.Callback):
    """Saves the last optimizer step when a fit ends, and ends a fit cleanly at SIGTERM and Ctrl-C.

    When a fit ends, `last.ckpt` of each ModelCheckpoint with `save_last` holds its last step; if there is none with it,
    that of the first ModelCheckpoint does. A signal takes effect between two batches, or at once while a single process
    validates: the step is saved and `Stopped` raised in all processes. The first process decides for all. A second
    Ctrl-C stops at once, without saving. A job that SLURM will requeue is saved between two batches, too.

    Attributes:
        received: the signal that has come and has not taken effect; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self.requeue: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals: Lightning's own handlers act in the middle of a step, where nothing can be saved."""
        # Lightning has noted one that came while the loading processes started.
        self.received = signal.SIGTERM if trainer.received_sigterm else 0
        self.trainer = trainer
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        requeue = getattr(environment, "requeue_signal", None) if getattr(environment, "auto_requeue", False) else None
        if requeue is not None:
            self.requeue = (requeue, signal.getsignal(requeue))
            signal.signal(requeue, self._note)
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        # Lightning asks its first process before each batch whether SIGTERM has come: one question for all signals.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._agree  # type: ignore[method-assign]

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let SIGTERM end the process: Lightning would continue."""
        end_at_sigterm(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let SIGTERM end the process: Lightning would continue."""
        end_at_sigterm(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if a signal has come to the only process; several agree before the next batch.

        Raises:
            Stopped: if so.
        """
        if trainer.world_size == 1:
            self._act(self.received)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop, if a signal has come: validation may take hours.

        Raises:
            Stopped: if so.
        """
        if trainer.state.fn != "fit":
            end_at_sigterm(trainer)
        elif not trainer.sanity_checking:
            self._agree()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last step if a signal has ended the run; after an error there is nothing worth keeping."""
        if not isinstance(exception, Stopped):
            return
        files = self._save(trainer)
        if trainer.is_global_zero:
            name, step = signal.Signals(exception.signum).name, trainer.global_step
            resume = f"resume with --ckpt_path {files[0]}" if files else "not saved: the trainer has no ModelCheckpoint"
            log.warning("stopped by %s after step %d: %s", name, step, resume)

    def _note(self, signum: int, frame: Any) -> None:
        trainer = self.trainer
        if signum == signal.SIGINT and self.received == signum:
            raise KeyboardInterrupt
        self.received = self.received or signum
        if trainer.validating and trainer.world_size == 1:
            self._act(signum)
        elif trainer.is_global_zero:
            log.warning("%s: stopping after this step (Ctrl-C again: at once)", signal.Signals(signum).name)

    def _agree(self) -> None:
        received = self.received
        if self.trainer.world_size > 1:
            shared = torch.tensor(received, device=self.trainer.strategy.root_device)
            dist.broadcast(shared, src=0)
            received = int(shared)
        self._act(received)

    def _act(self, signum: int) -> None:
        if not signum:
            return
        self.received = 0
        if self.requeue is not None and signum == self.requeue[0]:
            self.requeue[1](signum, None)
            return
        environment = self.trainer._accelerator_connector.cluster_environment
        is_spawned = self.trainer.local_rank > 0 and not environment.creates_processes_externally
        raise Stopped(signum, is_spawned)

    def _save(self, trainer: L.Trainer) -> list[Path]:
        """Write what is missing, in all processes, and return where the last step is."""
        callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if getattr(trainer, "fast_dev_run", False) or not callbacks or not trainer.global_step:
            return []
        saving = [callback for callback in callbacks if callback.save_last] or callbacks[:1]
        for callback in saving:
            if callback._last_global_step_saved == trainer.global_step and (
                callback.save_last == "link" or callback._last_checkpoint_saved == callback.last_model_path != ""
            ):
                continue
            # A file in any case: a link would lead to an earlier step.
            kept, callback.save_last = callback.save_last, True
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
            callback.save_last = kept
        return [Path(callback.last_model_path) for callback in saving]


def end_at_sigterm(trainer: L.Trainer) -> None:
    """Let SIGTERM end the process, and those it has started: outside of a fit Lightning only records it."""

    def end(signum: int, frame: Any) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        raise SystemExit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)
        # It may have come while the loading processes started.
        if trainer.received_sigterm:
            end(signal.SIGTERM, None)
