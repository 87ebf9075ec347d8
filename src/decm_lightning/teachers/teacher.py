"""What a teacher is: a frozen velocity field in this package's convention, and the start of a student."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from decm_lightning.networks import Network
from decm_lightning.types import Condition, Sample, Time


class Teacher:
    """A frozen network u(x_t, t, s, condition) asked on its diagonal, v = u(x_t, t, t, condition).

    It is not an nn.Module: a LightningModule that holds one neither trains it, nor changes its mode, nor puts it into a
    checkpoint. Families with another time, sign or prediction type override `velocity`.

    Args:
        network: the network; it is put into eval mode and its parameters are frozen.
    """

    def __init__(self, network: Network) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t), without a graph."""
        return self.velocity(x_t, t, condition)

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v(x_t, t) in the convention of `path`."""
        return self.network(x_t, t, t, condition)

    def null(self, condition: Condition) -> Condition:
        """Return the condition of an unconditional pass."""
        return self.network.null(condition)

    def networks(self) -> list[Network]:
        """Return the networks that a velocity takes a pass of, which may be compiled."""
        return [self.network]

    def sharded(self) -> list[Network]:
        """Return the networks that FSDP2 divides among the processes; the others stay whole in each."""
        return self.networks()

    def identity(self) -> str:
        """Return a hash of all weights: a run is resumed with the teacher that it began with."""
        return " ".join(network.identity() for network in self.networks())

    def evaluated_modules(self) -> list[nn.Module]:
        """Return the modules of which a forward pass of one row is one network evaluation (NFE).

        None for a teacher without a module: there a row of `velocity` is one evaluation.
        """
        return list(self.networks())

    def student(self) -> Network:
        """Return a trainable flow map that equals the teacher for every end time."""
        # The first process alone may have the weights.
        is_meta = any(parameter.is_meta for parameter in self.network.parameters())
        with torch.device("meta") if is_meta else nullcontext():
            return self.network.with_end_time().train()

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the network along with the module that holds the teacher."""
        return self.network._apply(function, recurse)
