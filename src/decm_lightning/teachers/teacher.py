"""The base class of teachers: a frozen velocity field from which a student is initialized."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.networks import Network
from decm_lightning.types import Condition, Sample, Time


class Teacher:
    """A frozen network u(x_t, t, s, condition), evaluated at s = t: v = u(x_t, t, t, condition).

    It is not an nn.Module, so a LightningModule with a teacher neither trains it, nor changes its mode, nor saves it in
    checkpoints. Families with a different time, sign or prediction type override `velocity`.

    Args:
        network: the network. It is put into eval mode, and its parameters are frozen.

    Attributes:
        name: the path or name from which the teacher was loaded; "" if it was not.
    """

    name = ""

    def __init__(self, network: Network) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), without an autograd graph."""
        return self.velocity(x_t, t, condition)

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t) in the convention of `path`."""
        return self.network(x_t, t, t, condition)

    def null(self, condition: Condition) -> Condition:
        """Return the condition of an unconditional pass."""
        return self.network.null(condition)

    def networks(self) -> list[Network]:
        """Return the networks that compute a velocity; they may be compiled."""
        return [self.network]

    def sharded(self) -> list[Network]:
        """Return the networks that FSDP2 shards across the processes; every process stores the others whole."""
        return self.networks()

    def identity(self) -> str:
        """Return a hash of all weights, to check that a run is resumed with the same teacher."""
        return " ".join(network.identity() for network in self.networks())

    def evaluated_modules(self) -> list[nn.Module]:
        """Return the modules whose forward passes are counted as network evaluations (NFE), one per row.

        For a teacher without modules, each row of `velocity` counts as one evaluation.
        """
        return list(self.networks())

    def student(self) -> Network:
        """Return a trainable flow map that initially equals the teacher for every end time."""
        # In distributed training, only the first process may have the weights.
        is_meta = any(parameter.is_meta for parameter in self.network.parameters())
        with torch.device("meta") if is_meta else nullcontext():
            return self.network.with_end_time().train()

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply a function to the weights: moving or casting the parent module also moves or casts the teacher."""
        return self.network._apply(function, recurse)
