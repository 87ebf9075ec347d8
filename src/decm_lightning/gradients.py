"""The norm of all gradients together, taken once a step, and gradients scaled by it."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients together, over all devices if they are sharded."""
    norm = get_total_norm(gradients)
    # Sharded gradients give a norm that is itself distributed.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_by_norm(gradients: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients in place by min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does.

    Args:
        gradients: all of them.
        limit: largest norm, above 0.
        norm: their norm, as `total_norm` returns it; it is not read on the host.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    if local:
        torch._foreach_mul_(local, factor.to(local[0].device))
