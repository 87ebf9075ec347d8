"""The gradient norm of each loss and of their sum, and a count of spikes: the paper's Figure 4 while training."""

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

import lightning as L
import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

SPIKE = 10.0


class GradientNorms(L.Callback):
    """Logs `grad_norm/total` at each step, `grad_norm/<loss>` at every n-th, and `grad_norm/spikes` so far.

    Norms are taken before clipping. A spike is a step whose total norm exceeds ten times the median of the last
    `window` steps. A loss's own norm costs one more backward pass, so it is taken only now and then; the losses' norms
    need not add up to the total's, since gradients of opposite directions cancel. Among several processes, gradients
    are averaged over all before their norm is taken.

    Args:
        every_n_steps: steps between two measurements of the losses one by one, at steps 0, n, 2n and so on, of those
            that are due there; 0 for never. In between the last norms are logged again, for loggers of any interval.
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
        self.single: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep what several backward passes need: the first that is compiled may overwrite it otherwise."""
        if self.every_n_steps:
            torch._functorch.config.donated_buffer = False

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Differentiate each loss by itself, where the graph still is."""
        if not self.every_n_steps or trainer.global_step % self.every_n_steps:
            return
        network = pl_module.network
        if isinstance(network, FSDPModule) and trainer.accumulate_grad_batches > 1:
            # The backward passes would add to what is accumulated.
            return
        for name, term in pl_module.terms.items():
            self.single[f"grad_norm/{name}"] = total_norm(_gradients(term.value, network))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Measure the sum, before it is clipped, and log all."""
        total = total_norm(p.grad for p in pl_module.network.parameters() if p.grad is not None).item()
        if len(self.recent) >= 10 and total > SPIKE * median(self.recent):
            self.spikes += 1
        self.recent.append(total)
        pl_module.log_dict(self.single)
        pl_module.log("grad_norm/total", total, prog_bar=True)
        pl_module.log("grad_norm/spikes", float(self.spikes))

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the window, so that a resumed run counts on."""
        return {"spikes": self.spikes, "recent": list(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved count and window."""
        self.spikes = state_dict["spikes"]
        self.recent.extend(state_dict["recent"])


def _gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    """Return one loss's gradient, averaged over all processes as the sum's will be, and leave the graph in place."""
    if isinstance(network, FSDPModule):
        return _sharded_gradients(loss, network)
    found = torch.autograd.grad(loss, _trained(network), retain_graph=True, allow_unused=True)
    gradients = [gradient for gradient in found if gradient is not None]
    if dist.is_initialized():
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients


def _sharded_gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    # Only the backward pass itself gathers the shards and averages their gradients. It leaves them at the shards, which
    # are the network's parameters again once it is over.
    loss.backward(retain_graph=True)
    gradients = []
    for parameter in _trained(network):
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            parameter.grad = None
    return gradients


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, over all devices if they are sharded."""
    norm = get_total_norm(gradients)
    # Sharded gradients give a norm that is itself distributed.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
