"""Compute the norm of all gradients, and clip gradients by it."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


class HasValue(Protocol):
    """A loss of a step, such as `losses.LossTerm`."""

    @property
    def value(self) -> Tensor:
        """The weighted loss, a scalar with a graph."""


@runtime_checkable
class LossModule(Protocol):
    """The interface of a training module that checks and gradient norms read. `FlowTraining` implements it.

    Attributes:
        network: the trained network.
        gradient_norm: this step's norm of all gradients before clipping, on the device; the checks set it.
    """

    network: nn.Module
    gradient_norm: Tensor

    @property
    def terms(self) -> Mapping[str, HasValue]:
        """This step's losses by name."""

    def origin(self) -> str:
        """Return where the first NaN or infinity of this step arose, "" if unknown."""


def loss_module(module: Any) -> LossModule:
    """Return the module if it has named losses.

    Raises:
        TypeError: if it has no named losses.
    """
    if not isinstance(module, LossModule):
        raise TypeError(f"{type(module).__name__} has no named losses: use a Distiller or a TeacherTraining")
    return module


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, over all devices if they are sharded."""
    norm = get_total_norm(gradients)
    # The norm of sharded gradients is a DTensor.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_by_norm(gradients: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients in place by min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does.

    Args:
        gradients: all gradients.
        limit: largest norm, above 0.
        norm: their norm, as `total_norm` returns it; it is not read on the host.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_mul_(local, factor.to(local[0].device))
