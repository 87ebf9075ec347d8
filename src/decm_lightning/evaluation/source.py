"""The interface of a LightningModule that evaluation needs."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from decm_lightning.guidance import Guidance
from decm_lightning.networks import Network
from decm_lightning.teachers import Teacher
from decm_lightning.types import FlowMapNetwork


@runtime_checkable
class SampleSource(Protocol):
    """A LightningModule that can be sampled; `training.FlowTraining` is one.

    Attributes:
        average: the averaged network, which is sampled instead of the network in training.
        ema_decay: the decay of the average; None for a network as it was loaded.
        teacher: the frozen teacher, None if the module has none.
        guidance: how the teacher, or the network that will become one, is guided.
    """

    average: Network
    teacher: Teacher | None
    guidance: Guidance

    @property
    def ema_decay(self) -> float | None:
        """The decay of the average, None if there is none."""

    @property
    def device(self) -> torch.device:
        """The device of the module."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its samples."""

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return the flow maps that can be sampled, by name."""

    def modules(self) -> Iterator[nn.Module]:
        """Return the module and all modules in it."""

    def eval(self) -> Any:
        """Put all modules into eval mode."""
