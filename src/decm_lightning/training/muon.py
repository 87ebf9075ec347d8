"""Muon for the matrices of a network, AdamW for its other weights, as one optimizer."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all other weights, with one learning rate.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's averaged gradient by its
    nearest semi-orthogonal matrix O, approximately. The step is -lr 0.2 sqrt(max(rows, columns)) O, whose root mean
    square is about that of AdamW's step (Liu et al. 2025, arXiv 2502.16982), so that AdamW's learning rate fits both.

    Args:
        params: the weights.
        lr: learning rate of all weights.
        weight_decay: decoupled weight decay of all weights; 0 for none.
        momentum: decay of the matrices' averaged gradient, in [0, 1), with Nesterov's correction.
        betas: decays of AdamW's moments.

    Raises:
        ValueError: if params is empty.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        weights = list(params)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [weight for weight in weights if weight.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay))
        # Schedules such as OneCycleLR read the defaults.
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([group for part in self.parts for group in part.param_groups], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all weights; return what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            # Loading a state replaces both.
            part.state, part.param_groups = self.state, [group]
            part.step()
        return loss
