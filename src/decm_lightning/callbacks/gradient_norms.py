"""Log the gradient norm of each loss and of their sum, and count spikes, as in the paper's Figure 4."""

from typing import Any, ClassVar

import lightning as L
import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from decm_lightning.gradients import loss_module, total_norm

SPIKE = 10.0
FEWEST = 10


class GradientNorms(L.Callback):
    """Logs `grad_norm/total` at each step, `grad_norm/<loss>` regularly, and the number `grad_norm/spikes`.

    Norms are computed before clipping, from gradients averaged over all processes. A spike is a step whose total norm
    exceeds ten times the median of the last `window` steps. Steps with a non-finite norm, which a gradient scaler
    skips, are ignored. The norm of a single loss costs a backward pass, so it is only computed every `every_n_steps`
    steps. The norms of the losses need not add up to the total, because opposite gradients cancel. The total is the
    norm that the module's checks compute. The callback never waits for the device.

    Args:
        every_n_steps: steps between two measurements of single losses, starting at step 0, for losses that are active
            there; 0 for never. Between them the last norms are logged again, so loggers of any interval see them.
        window: steps in the median, at least 10.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, every_n_steps: int = 50, window: int = 200) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps must be at least 0: got {every_n_steps}")
        if window < FEWEST:
            raise ValueError(f"window must be at least {FEWEST}: got {window}")
        self.every_n_steps = every_n_steps
        # A ring buffer: the next norm replaces the oldest. Unused entries are NaN.
        self.recent = torch.full((window,), torch.nan)
        self.next = 0
        self.spikes = torch.zeros(())
        self.single: dict[str, Tensor] = {}
        self.last_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the buffers of a compiled backward pass for the next one; otherwise the first may overwrite them."""
        if self.every_n_steps and stage == "fit":
            KeptBuffers.keep(self)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the setting of the process."""
        KeptBuffers.release(self)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the setting of the process, because Lightning does not call teardown after an error."""
        KeptBuffers.release(self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the current optimizer step."""
        self.last_step = trainer.global_step
        self.recent, self.spikes = self.recent.to(pl_module.device), self.spikes.to(pl_module.device)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Differentiate each loss separately while the graph exists."""
        if not self.every_n_steps or trainer.global_step % self.every_n_steps:
            return
        module = loss_module(pl_module)
        network = module.network
        if isinstance(network, FSDPModule) and trainer.accumulate_grad_batches > 1:
            # The backward passes would add to the accumulated gradients.
            return
        for name, term in module.terms.items():
            self.single[f"grad_norm/{name}"] = total_norm(_gradients(term.value, network))
        if isinstance(network, FSDPModule):
            # These backward passes also reach parameters outside the network, such as learned weights of losses.
            pl_module.zero_grad()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the norms after an optimizer step, but not after an accumulated batch."""
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        # The median needs float32 or wider.
        norm = loss_module(pl_module).gradient_norm
        total = norm.to(torch.promote_types(norm.dtype, torch.float32))
        enough = self.recent.isfinite().sum() >= FEWEST
        self.spikes += enough & total.isfinite() & (total > SPIKE * self.recent.nanquantile(0.5))
        self.recent[self.next] = torch.where(total.isfinite(), total, torch.nan)
        self.next = (self.next + 1) % len(self.recent)
        pl_module.log_dict(self.single)
        # Not in the progress bar, for which Lightning would read it on the host at every step.
        pl_module.log("grad_norm/total", total)
        # A clone, because the logger reads it later.
        pl_module.log("grad_norm/spikes", self.spikes.clone())

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the window, so that a resumed run continues the count."""
        recent = self.recent.roll(-self.next).tolist()
        return {"spikes": int(self.spikes), "recent": [norm for norm in recent if norm == norm]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved count and its last norms, up to the size of the window."""
        window = len(self.recent)
        recent = state_dict["recent"][-window:]
        self.recent = torch.tensor([*recent, *[torch.nan] * (window - len(recent))])
        self.next = len(recent) % window
        self.spikes = torch.tensor(float(state_dict["spikes"]))


class KeptBuffers:
    """Disables donated buffers, a setting of the whole process, while a callback needs it."""

    users: ClassVar[set[int]] = set()
    before: ClassVar[bool] = True

    @classmethod
    def keep(cls, user: object) -> None:
        """Disable donated buffers for a user."""
        if not cls.users:
            cls.before = torch._functorch.config.donated_buffer
        cls.users.add(id(user))
        torch._functorch.config.donated_buffer = False

    @classmethod
    def release(cls, user: object) -> None:
        """Restore the setting after the last user. Unknown users are ignored."""
        if id(user) not in cls.users:
            return
        cls.users.remove(id(user))
        if not cls.users:
            torch._functorch.config.donated_buffer = cls.before


def _gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    """Return the gradient of one loss, averaged over all processes, and keep the graph."""
    if isinstance(network, FSDPModule):
        return _sharded_gradients(loss, network)
    optional = torch.autograd.grad(loss, _trained(network), retain_graph=True, allow_unused=True)
    gradients = [gradient for gradient in optional if gradient is not None]
    if dist.is_initialized():
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients


def _sharded_gradients(loss: Tensor, network: nn.Module) -> list[Tensor]:
    # Only backward() gathers the shards and averages their gradients. Afterwards the network's parameters are the
    # shards again, with their gradients.
    loss.backward(retain_graph=True)
    gradients = []
    for parameter in _trained(network):
        if parameter.grad is not None:
            gradients.append(parameter.grad)
            parameter.grad = None
    return gradients


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
