"""What evaluation needs from a LightningModule."""

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
        average: the averaged network: the network in training is never sampled.
        ema_decay: its decay.
        teacher: the frozen teacher, None if the module has none.
        guidance: how the teacher, or the network that will become one, is guided.
    """

    average: Network
    teacher: Teacher | None
    guidance: Guidance

    @property
    def ema_decay(self) -> float:
        """The decay of the average."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its samples."""

    def models(self) -> dict[str, FlowMapNetwork]:
        """Return what can be sampled, by name."""

    def modules(self) -> Iterator[nn.Module]:
        """Return the module and all modules in it."""

    def eval(self) -> Any:
        """Put all of them into eval mode."""


def sample_source(module: object) -> SampleSource:
    """Return a module that can be sampled.

    Raises:
        ValueError: if it cannot.
    """
    if not isinstance(module, SampleSource):
        needed = "models(), average, ema_decay, teacher and guidance, as training.FlowTraining has"
        raise ValueError(f"samples need a module with {needed}: got {type(module).__name__}")
    return module
