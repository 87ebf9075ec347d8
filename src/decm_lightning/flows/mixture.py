"""The exact flow of a Gaussian mixture, with its velocity in closed form and its flow map by a Runge-Kutta solver."""

import math

import torch
from torch import Tensor
from torchdiffeq import odeint

from decm_lightning.path import DATA, expand
from decm_lightning.types import Batch, Labels, Sample, Time


class GaussianMixture:
    """The flow from N(0, I) to sum_k w_k N(mean_k, std^2 I), as a VelocityField; each component is a class.

    v is the mean of the components' Gaussian velocities under the posterior of the component at (x_t, t). Condition k
    restricts the mixture to component k. Condition K (the number of components) or None selects the whole mixture.

    Args:
        means: (K, d).
        std: standard deviation of every component, above 0.
        weights: (K,), above 0, with sum 1; None for equal weights.
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None) -> None:
        self.means = means
        self.std = std
        self.weights = torch.full((len(means),), 1 / len(means), dtype=means.dtype) if weights is None else weights

    @classmethod
    def ring(
        cls, components: int = 8, radius: float = 2.0, std: float = 0.2, dtype: torch.dtype = torch.float32
    ) -> "GaussianMixture":
        """Return equal components on a circle in the plane, as used in the docs and the tests."""
        angles = torch.arange(components, dtype=dtype) * (2 * math.pi / components)
        return cls(radius * torch.stack([angles.cos(), angles.sin()], 1), std)

    def __call__(self, x_t: Sample, t: Time, condition: Labels = None) -> Sample:
        """Return v(x_t, t) = sum_k p(k | x_t, t) (mean_k + q(t) / a(t)^2 (x_t - t mean_k)), (b, d)."""
        means = self.means.to(x_t)
        a_squared = (1 - t) ** 2 + t**2 * self.std**2
        centered = x_t[:, None, :] - t[:, None, None] * means
        logits = self.weights.to(x_t).log() - centered.square().sum(-1) / (2 * a_squared[:, None])
        if condition is not None:
            classes = torch.arange(len(means), device=x_t.device)
            allowed = (classes == condition[:, None]) | (condition[:, None] == len(means))
            logits = logits.masked_fill(~allowed, -torch.inf)
        ratio = (t * self.std**2 - (1 - t)) / a_squared
        velocities = means + ratio[:, None, None] * centered
        return torch.einsum("bk,bkd->bd", logits.softmax(1), velocities)

    def null(self, condition: Labels) -> Labels:
        """Return the condition that selects the whole mixture."""
        return None if condition is None else torch.full_like(condition, len(self.means))

    def flow_map(self, x_t: Sample, t: Time, s: Time, condition: Labels = None, tolerance: float = 1e-9) -> Sample:
        """Return f(x_t, t, s) by Dormand-Prince 5(4), with each row's interval mapped to [0, 1]."""

        def rescaled(tau: Tensor, x: Sample) -> Sample:
            return expand(s - t, x) * self(x, t + (s - t) * tau, condition)

        unit = torch.tensor([0.0, DATA], dtype=x_t.dtype, device=x_t.device)
        return odeint(rescaled, x_t, unit, rtol=tolerance, atol=tolerance, method="dopri5")[-1]

    def sample(self, count: int, generator: torch.Generator) -> Batch:
        """Return `count` samples of x_1, (count, d), with their components as labels."""
        labels = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return Batch(self.means[labels] + self.std * noise, labels)
