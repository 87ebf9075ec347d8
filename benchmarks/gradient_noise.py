"""The gradient noise of each loss while a run trains, and the batch fractions with the least noise at the same cost.

    python -m decm_lightning fit --config configs/digits/decm.yaml \
        --trainer.callbacks+ benchmarks.gradient_noise.GradientNoise

A loss is the mean over its n rows, so the variance of its gradient is sigma^2 / n. The sum of these variances at a
fixed cost, the sum of n times the cost c of a row, is smallest with n proportional to sigma / sqrt(c) (Neyman's
allocation). The noise counts as the optimizer sees it: each coordinate is divided by Adam's root of the second moment.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from decm_lightning.distiller import Distiller
from decm_lightning.losses import cost
from decm_lightning.types import Batch


def allocation(sigmas: dict[str, float], costs: dict[str, float]) -> dict[str, float]:
    """Return the batch fractions proportional to sigma / sqrt(c), which sum to 1.

    >>> allocation({"triangle": 2.0, "flow_matching": 1.0}, {"triangle": 4.0, "flow_matching": 1.0})
    {'triangle': 0.5, 'flow_matching': 0.5}

    Args:
        sigmas: root of each loss's variance times its number of rows.
        costs: forward passes per row of each loss.
    """
    shares = {name: sigma / costs[name] ** 0.5 for name, sigma in sigmas.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


class GradientNoise(L.Callback):
    """Measures the variance of each loss's gradient over `window` steps, once every `every_n_steps` steps.

    Within a window the weights move, so that what the mean gradient changes counts as noise too. Writes
    gradient_noise.json into the run's folder after each window. It needs Adam or AdamW, and a run without `compile`.

    Args:
        every_n_steps: steps from one window to the next.
        window: steps in a window, at least 2.
    """

    def __init__(self, every_n_steps: int = 150, window: int = 40) -> None:
        self.every_n_steps, self.window = every_n_steps, window
        self.sums: dict[str, list[Tensor]] = {}
        self.squares: dict[str, float] = {}
        self.windows: list[dict[str, Any]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Add each loss's gradient to the sums of the current window."""
        assert isinstance(pl_module, Distiller)
        # The last `window` steps before each multiple of `every_n_steps`, when Adam's second moment exists.
        place = trainer.global_step % self.every_n_steps - (self.every_n_steps - self.window)
        if place < 0:
            return
        parameters = [p for p in pl_module.student.parameters() if p.requires_grad]
        state = trainer.optimizers[0].state
        for name, term in pl_module.terms.items():
            found = torch.autograd.grad(term.value, parameters, retain_graph=True, allow_unused=True)
            # Second moments without Adam's correction for its zero start differ by one factor, which cancels.
            gradients = [
                torch.zeros_like(p)
                if g is None
                else g / (state[p]["exp_avg_sq"].sqrt() + trainer.optimizers[0].defaults["eps"])
                for g, p in zip(found, parameters, strict=True)
            ]
            if place == 0:
                self.sums[name], self.squares[name] = [torch.zeros_like(g) for g in gradients], 0.0
            torch._foreach_add_(self.sums[name], gradients)
            self.squares[name] += sum(float(g.square().sum()) for g in gradients)
        if place == self.window - 1:
            self.write(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Keep the number of rows."""
        self.batch = len(batch[0])

    def write(self, trainer: L.Trainer, module: Distiller) -> None:
        """Append the window's noise, and the fractions that it asks for, to gradient_noise.json."""
        count, rows = self.window, module.objective.rows(self.batch)
        sigmas, costs = {}, {}
        for name, sums in self.sums.items():
            squared_mean = sum(float(s.square().sum()) for s in sums) / count**2
            variance = (self.squares[name] / count - squared_mean) * count / (count - 1)
            sigmas[name] = (variance * len(rows[name])) ** 0.5
            alone = {name: replace(module.objective.losses[name], batch_fraction=1.0)}
            costs[name] = cost(replace(module.objective, losses=alone), module.guidance.passes).total
        found = {"sigma": sigmas, "batch_fractions": allocation(sigmas, costs)}
        self.windows.append({"step": trainer.global_step + 1} | found)
        place = Path(trainer.log_dir or trainer.default_root_dir) / "gradient_noise.json"
        place.write_text(json.dumps(self.windows, indent=1))
