"""What to do after a training run or a test."""

import shlex
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from decm_lightning.files import shown
from decm_lightning.networks import Network


def print_end(trainer: L.Trainer, network: Network) -> None:
    """Print the folder of a run's log, its last checkpoint, and the command that generates images from it."""
    # A collective operation.
    folder = trainer.log_dir
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.last_model_path]
    if not trainer.is_global_zero:
        return
    if trainer.loggers and folder:
        print(f"logged to {shown(folder)}")
    if callbacks:
        path = shown(callbacks[0].last_model_path)
        print(f"wrote {path}")
        print_next(path, network)


def print_next(path: str | Path, network: Network) -> None:
    """Print the command that generates images from a checkpoint."""
    if len(network.sample_shape) == 3:
        command, prompts = ("sample-prompts", " --prompts FILE") if network.reads_captions else ("sample", "")
        steps = " --steps 4" if network.reads_end_time else ""
        print(f"next: decm {command} {shlex.quote(str(path))}{prompts}{steps}")
