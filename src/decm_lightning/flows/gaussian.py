"""The exact flow of a Gaussian, with all quantities of the method in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decm_lightning.path import expand
from decm_lightning.types import Condition, Sample, Time


@dataclass(frozen=True)
class Gaussian:
    """The flow from N(0, I) to x_1 ~ N(mean, std^2 I). It is a FlowMapNetwork; `velocity` is its VelocityField.

    With a(t)^2 = (1 - t)^2 + t^2 std^2, the marginal at t is N(t mean, a(t)^2 I). The standard score is constant along
    a trajectory, so f(x_t, t, s) = s mean + a(s) / a(t) (x_t - t mean).

    >>> flow, x_0 = Gaussian(mean=3.0, std=0.5), torch.tensor([[-1.0], [1.0]])
    >>> t, s = torch.zeros(2), torch.ones(2)
    >>> flow.flow_map(x_0, t, s).flatten()
    tensor([2.5000, 3.5000])
    >>> (x_0 + flow(x_0, t, s)).flatten()
    tensor([2.5000, 3.5000])

    Args:
        mean: (d,) or a number.
        std: above 0.
    """

    mean: Tensor | float = 0.0
    std: float = 1.0

    def scale(self, t: Time) -> Time:
        """Return a(t), the standard deviation at time t."""
        return ((1 - t) ** 2 + t**2 * self.std**2).sqrt()

    def velocity(self, x_t: Sample, t: Time, condition: Condition = None) -> Sample:
        """Return v = mean + q(t) / a(t)^2 (x_t - t mean), with q(t) = t std^2 - (1 - t) = a a'."""
        ratio = (t * self.std**2 - (1 - t)) / self.scale(t) ** 2
        return self.mean + expand(ratio, x_t) * (x_t - expand(t, x_t) * self.mean)

    def flow_map(self, x_t: Sample, t: Time, s: Time) -> Sample:
        """Return f(x_t, t, s)."""
        ratio = self.scale(s) / self.scale(t)
        return expand(s, x_t) * self.mean + expand(ratio, x_t) * (x_t - expand(t, x_t) * self.mean)

    def __call__(self, x_t: Sample, t: Time, s: Time, condition: Condition = None) -> Sample:
        """Return u = mean + ((1 + std^2)(s + t) - 2) / (a(t) (a(s) + a(t))) (x_t - t mean), valid at s = t too."""
        a_t, a_s = self.scale(t), self.scale(s)
        ratio = ((1 + self.std**2) * (s + t) - 2) / (a_t * (a_s + a_t))
        return self.mean + expand(ratio, x_t) * (x_t - expand(t, x_t) * self.mean)

    def sample(self, count: int, dimensions: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Return `count` samples of x_1, (count, dimensions)."""
        return self.mean + self.std * torch.randn(count, dimensions, generator=generator, dtype=dtype)
