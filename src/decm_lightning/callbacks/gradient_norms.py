"""The gradient norm of each loss and of their sum, and a count of spikes: the paper's Figure 4 while training."""

from collections import deque
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

SPIKE = 10.0


class GradientNorms(L.Callback):
    """Logs `grad_norm/total` at each step, `grad_norm/<loss>` at every n-th, and `grad_norm/spikes` so far.

    Norms are taken before clipping. A spike is a step whose total norm exceeds ten times the median of the last
    `window` steps. A loss's own norm costs one more backward pass, so it is taken only now and then; the losses' norms
    need not add up to the total's, since gradients of opposite directions cancel.

    Args:
        every_n_steps: steps between two measurements of the losses one by one; 0 for never.
        window: steps in the median, at least 10.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, every_n_steps: int = 50, window: int = 200) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps must be at least 0: got {every_n_steps}")
        if window < 10:
            raise ValueError(f"window must be at least 10: got {window}")
        self.every_n_steps = every_n_steps
        self.recent: deque[float] = deque(maxlen=window)
        self.spikes = 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Differentiate each loss by itself, where the graph still is."""
        terms = getattr(pl_module, "terms", {})
        if not self.every_n_steps or (trainer.global_step + 1) % self.every_n_steps or not terms:
            return
        parameters = [p for p in pl_module.get_submodule("network").parameters() if p.requires_grad]
        norms = {}
        for name, term in terms.items():
            gradients = torch.autograd.grad(term.value, parameters, retain_graph=True, allow_unused=True)
            norms[f"grad_norm/{name}"] = _norm([g for g in gradients if g is not None])
        pl_module.log_dict(norms)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure the sum, before it is clipped."""
        total = _norm([p.grad for p in pl_module.get_submodule("network").parameters() if p.grad is not None]).item()
        if len(self.recent) >= 10 and total > SPIKE * median(self.recent):
            self.spikes += 1
        self.recent.append(total)
        pl_module.log("grad_norm/total", total, prog_bar=True)
        pl_module.log("grad_norm/spikes", float(self.spikes))

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the window, so that a resumed run counts on."""
        return {"spikes": self.spikes, "recent": list(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved count and window."""
        self.spikes = state_dict["spikes"]
        self.recent.extend(state_dict["recent"])


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = get_total_norm(gradients)
    # Sharded gradients give a norm that is itself distributed.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
