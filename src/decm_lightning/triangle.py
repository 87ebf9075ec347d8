"""The (t, s) triangle, 0 <= t <= s <= 1, and its edges.

A jump starts at time t and ends at time s. Each few-step method of this family trains a student on a region of the
triangle:

    s
    1 +-------------+   DataEdge    s = 1   consistency: few-step ability
      |           /     NoiseEdge   t = r   noise to any noisy point: an accurate first step
      |         /       Diagonal    s = t   flow matching: stability, many-step ability
      |       /         Triangle    the whole triangle (MeanFlow, AYF, Lagrangian distillation)
      |     /
      |   /
    0 + /           t
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from decm_lightning.path import DATA, NOISE
from decm_lightning.types import Time

PAPER_DECAY = 20_000
"""Training steps over which the start time of the paper's noise edge falls to 0."""


@dataclass(frozen=True)
class Times:
    """Start and end times of a batch of jumps, each (b,), with 0 <= t <= s <= 1."""

    t: Time
    s: Time


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


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """Stratified logit-normal: sigmoid(mean + std * N(0, 1)), by quantiles (SD3, arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def quantiles(self, levels: Time) -> Time:
        """Return sigmoid(mean + std * the normal quantile)."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6)))


class Edge(ABC):
    """A region of the triangle to train on. Subclass it to add your own.

    Attributes:
        starts_at_batch_times: whether jumps start at the batch's (x_t, t). The teacher's velocity there is computed
            once for all such edges.
        has_length: false if s = t, where no derivative is needed.
    """

    starts_at_batch_times: ClassVar[bool] = True
    has_length: ClassVar[bool] = True

    @abstractmethod
    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Sample the start and end times of len(t) jumps at training step `step`, from the batch's times t."""

    def for_run(self, steps: int | None) -> "Edge":
        """Return the edge for a run of `steps` training steps; None if the number is unknown."""
        return self


@dataclass(frozen=True)
class DataEdge(Edge):
    """s = 1: jumps from any noisy point to data."""

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (t, 1)."""
        return Times(t, torch.full_like(t, DATA))


@dataclass(frozen=True)
class Diagonal(Edge):
    """s = t: jumps of length 0, where the mean velocity equals the instantaneous velocity."""

    has_length = False

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (t, t)."""
        return Times(t, t)


@dataclass(frozen=True)
class NoiseEdge(Edge):
    """t = r, s in [r, 1]: jumps from noise to any noisy point.

    r = start * max(0, 1 - step / decay_steps) falls to 0, which is pure noise (the paper: from 0.1 over 20,000 steps).

    Args:
        start: r at step 0, in [0, 1).
        decay_steps: training steps until r = 0, at least 1; None for a quarter of the run, but at most 20,000.

    Raises:
        ValueError: if a value is out of its range.
    """

    start: float = 0.0
    decay_steps: int | None = None
    starts_at_batch_times = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"start must be in [0, 1): got {self.start}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps must be at least 1: got {self.decay_steps}")

    def for_run(self, steps: int | None) -> "NoiseEdge":
        """Return the edge with its decay_steps filled in."""
        if self.decay_steps is not None or steps is None:
            return self
        return replace(self, decay_steps=min(max(1, steps // 4), PAPER_DECAY))

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (r, s) with s stratified over [r, 1]."""
        r = NOISE + self.start * max(0.0, 1 - step / (self.decay_steps or PAPER_DECAY))
        levels = stratified(len(t), generator).to(t)
        return Times(torch.full_like(t, r), r + (DATA - r) * levels)


@dataclass(frozen=True)
class Triangle(Edge):
    """The whole triangle: s is uniform over [t, 1] for the batch's t."""

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (t, t + (1 - t) U)."""
        levels = stratified(len(t), generator).to(t)
        return Times(t, t + (DATA - t) * levels)
