"""What the package asks of every network: a flow map with classes, a null class, and its own description."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from decm_lightning.types import Condition, Sample, Time


class Network(nn.Module, PyTorchModelHubMixin, ABC, library_name="decm-lightning", license="apache-2.0"):
    """A FlowMapNetwork with weights: u = network(x_t, t, s, condition).

    Attributes:
        config: the arguments that build the network again.
        sample_shape: the shape of one sample, without the batch.
        num_classes: how many classes there are; index num_classes is the null class of classifier-free guidance.
    """

    config: dict[str, Any]
    sample_shape: tuple[int, ...]
    num_classes: int

    @abstractmethod
    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), shaped like x_t."""

    @abstractmethod
    def with_landing_time(self) -> "Network":
        """Return a copy that also reads s, and at first equals this network for every s."""

    def null(self, condition: Condition) -> Condition:
        """Return as many null classes as there are labels."""
        return None if condition is None else torch.full_like(condition, self.num_classes)
