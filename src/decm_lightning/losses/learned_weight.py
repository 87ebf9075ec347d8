"""A weight of a loss that is learned as a function of the start time."""

import torch
from torch import Tensor, nn

from decm_lightning.types import Time


class LogWeight(nn.Module):
    """w(t), trained with the loss exp(w(t)) L(t) - w(t), whose minimum is w(t) = -log E[L(t)].

    All times then contribute equally (sCM, arXiv 2410.11081, section 4.2; EDM2, arXiv 2312.02696, section 2.4). w is a
    linear layer over fixed random Fourier features of t and is 0 at first.

    Args:
        features: number of Fourier features.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        # Fixed values, so that the features do not depend on the run's seed.
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(features, generator=generator))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(features, generator=generator))
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Time) -> Tensor:
        """Return w(t), (b,)."""
        weight = self.linear.weight
        angles = t[:, None].to(weight.dtype) * self.frequencies.to(weight) + self.phases.to(weight)
        values: Tensor = self.linear(2**0.5 * angles.cos())[:, 0]
        return values
