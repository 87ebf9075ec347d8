"""The exponential moving average of the weights."""

from typing import Any

import lightning as L
import torch


class EMA(L.Callback):
    """average <- decay average + (1 - decay) network after every optimiser step.

    The module owns both as submodules, `network` and `average`, so that a strategy shards and a checkpoint holds the
    average like any other weights; nothing is swapped in or out. The decay warms up as (1 + n) / (10 + n), n being
    the optimiser steps so far, and needs no state of its own.

    Args:
        decay: in [0, 1).

    Raises:
        ValueError: if the decay is outside its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1): got {decay}")
        self.decay = decay
        self.last_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count optimiser steps from where the run stands."""
        self.last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, unless the batch was only accumulated."""
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        average, network = pl_module.get_submodule("average"), pl_module.get_submodule("network")
        # What is frozen never changes, and of a student with LoRA it is nearly everything, shared with the average.
        moving = [
            (a.data, p.data) for a, p in zip(average.parameters(), network.parameters(), strict=True) if p.requires_grad
        ]
        torch._foreach_lerp_([a for a, _ in moving], [p for _, p in moving], 1 - decay)
