"""What to do after a training run."""

import os
import shlex

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from decm_lightning.networks import Network
from decm_lightning.types import Captions


def print_next(trainer: L.Trainer, network: Network) -> None:
    """Print the last checkpoint of a run, and the command that generates images from it."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.last_model_path]
    if not callbacks or not trainer.is_global_zero:
        return
    path = os.path.relpath(callbacks[0].last_model_path)
    print(f"wrote {path}")
    if len(network.sample_shape) == 3:
        captions = isinstance(network.example(1)[3], Captions)
        command, prompts = ("sample-prompts", " --prompts FILE") if captions else ("sample", "")
        steps = " --steps 4" if network.reads_end_time else ""
        print(f"next: decm {command} {shlex.quote(path)}{prompts}{steps}")
