"""A small MLP flow map on points, for notebooks and exact tests."""

import copy

import torch
from torch import nn

from decm_lightning.networks.embedding import ClassEmbedding
from decm_lightning.networks.network import Network, arguments
from decm_lightning.types import Condition, Sample, Time


class MLP(Network):
    """An MLP u(x_t, t, s, labels) on points x of shape (b, dimensions), with SiLU activations.

    Times are not embedded. The weights of s start at zero, so the network initially ignores s.

    Example:
        >>> network = MLP(dimensions=2, num_classes=8)
        >>> x_t, t, s, labels = network.example(rows=4)
        >>> network(x_t, t, s, labels).shape
        torch.Size([4, 2])

    Args:
        dimensions: size of x.
        width: hidden width.
        depth: number of hidden layers, at least 1.
        num_classes: number of classes, 0 for an unconditional flow. Label num_classes is the null class.
    """

    def __init__(self, dimensions: int = 2, width: int = 128, depth: int = 3, num_classes: int = 0) -> None:
        config = arguments(locals())
        super().__init__()
        self.config = config
        self.sample_shape = (dimensions,)
        self.num_classes = num_classes
        self.y_embedder = ClassEmbedding(num_classes, width) if num_classes else None
        self.start = nn.Linear(dimensions + 1, width)
        self.end_time = nn.Linear(1, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.end = nn.Linear(width, dimensions)
        nn.init.zeros_(self.end_time.weight)

    def forward(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return the mean velocity u over (t, s), (b, dimensions)."""
        h = self.start(torch.cat([x_t, t[:, None]], 1)) + self.end_time(s[:, None])
        if self.y_embedder is not None and condition is not None:
            h = h + self.y_embedder(condition)
        for layer in self.hidden:
            h = layer(nn.functional.silu(h))
        return self.end(nn.functional.silu(h))

    def with_end_time(self) -> "MLP":
        """Return a trainable copy; this network always reads s."""
        return copy.deepcopy(self).requires_grad_(True)
