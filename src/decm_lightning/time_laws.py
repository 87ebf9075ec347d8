"""Distributions of times over [0, 1], by their quantile functions, so that the times of a batch can be stratified."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from decm_lightning.types import Time


def stratified(count: int, generator: torch.Generator) -> Time:
    """Return one level from each of `count` equal parts of [0, 1], in random order: (rank + U[0, 1)) / count.

    The levels are float32 on the generator's device. They ignore torch's default dtype, which a bfloat16 run changes.
    """
    ranks = torch.randperm(count, generator=generator, device=generator.device)
    offsets = torch.rand(count, generator=generator, dtype=torch.float32, device=generator.device)
    return (ranks + offsets) / count


class TimeLaw(ABC):
    """A distribution of times over [0, 1], defined by its quantile function. Subclass it to add your own."""

    @abstractmethod
    def quantiles(self, levels: Time) -> Time:
        """Return the times at uniform levels in [0, 1): t with P(time < t) = level."""

    def levels(self, times: Time) -> Time:
        """Return P(time < t), the inverse of `quantiles`. Only edges that restrict the law to [t, 1] need it."""
        raise NotImplementedError(f"{type(self).__name__} defines no levels(times)")

    def draw(self, count: int, generator: torch.Generator) -> Time:
        """Sample `count` times on the generator's device, one from each of `count` parts of equal probability."""
        return self.quantiles(stratified(count, generator))


@dataclass(frozen=True)
class Uniform(TimeLaw):
    """Stratified uniform: one time from each of b equal parts of [0, 1], in random order.

    The variance of the batch mean falls from 1 / b to 1 / b^3 for a smooth loss. The paper finds it better than
    logit-normal and arctan-normal times.
    """

    def quantiles(self, levels: Time) -> Time:
        """Return the levels."""
        return levels

    def levels(self, times: Time) -> Time:
        """Return the times."""
        return times


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """Stratified logit-normal: sigmoid(mean + std * N(0, 1)), by quantiles (SD3, arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def quantiles(self, levels: Time) -> Time:
        """Return sigmoid(mean + std * the normal quantile)."""
        return torch.sigmoid(self.mean + self.std * _normal_quantiles(levels))

    def levels(self, times: Time) -> Time:
        """Return the normal distribution's level of (logit(t) - mean) / std."""
        return torch.special.ndtr((torch.logit(times) - self.mean) / self.std)


@dataclass(frozen=True)
class ArctanNormal(TimeLaw):
    """Stratified arctan-normal: t = 1 - (2 / pi) atan(exp(N(mean, std^2))), a log-normal tangent of the angle.

    FACM (arXiv 2507.03738) uses mean -0.8 and std 1.6. In sCM (arXiv 2410.11081, section 4.2) the tangent of the angle
    is a log-normal sigma / sigma_data: mean = P_mean - log(sigma_data) and std = P_std, if angles are mapped linearly
    to times. For the time with the same ratio of noise to data, 1 / (1 + tangent), use `LogitNormal(-mean, std)`.
    """

    mean: float = -0.8
    std: float = 1.6

    def quantiles(self, levels: Time) -> Time:
        """Return 1 - (2 / pi) atan(exp(mean + std * the normal quantile of 1 - level))."""
        # The time decreases with the normal variable.
        return 1 - 2 / math.pi * torch.atan(torch.exp(self.mean - self.std * _normal_quantiles(levels)))

    def levels(self, times: Time) -> Time:
        """Return the level of a time, in (0, 1)."""
        return torch.special.ndtr((self.mean - torch.tan(math.pi / 2 * (1 - times)).log()) / self.std)


@dataclass(frozen=True)
class SmallerOfTwo(TimeLaw):
    """The smaller of two independent times of a law: P(time < t) = 1 - (1 - F(t))^2 (MeanFlow, arXiv 2505.13447)."""

    law: TimeLaw

    def quantiles(self, levels: Time) -> Time:
        """Return the law's quantiles at 1 - (1 - level)^0.5."""
        return self.law.quantiles(1 - (1 - levels).sqrt())

    def levels(self, times: Time) -> Time:
        """Return 1 - (1 - F(t))^2."""
        return 1 - (1 - self.law.levels(times)) ** 2


@dataclass(frozen=True)
class Grid(TimeLaw):
    """Uniform over the times 0, 1 / steps, ..., 1 - 1 / steps (shortcut models, arXiv 2410.12557).

    Args:
        steps: number of times, at least 1.
    """

    steps: int = 128

    def quantiles(self, levels: Time) -> Time:
        """Return floor(level * steps) / steps."""
        return (levels * self.steps).floor().clamp(max=self.steps - 1) / self.steps


def _normal_quantiles(levels: Time) -> Time:
    return torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6))
