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
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from decm_lightning.path import DATA, NOISE
from decm_lightning.time_laws import TimeLaw, Uniform, stratified
from decm_lightning.types import Time

PAPER_DECAY = 20_000
"""Training steps over which the start time of the paper's noise edge falls to 0."""


@dataclass(frozen=True)
class Times:
    """Start and end times of a batch of jumps, each (b,), with 0 <= t <= s <= 1."""

    t: Time
    s: Time


class Edge(ABC):
    """A region of the triangle to train on. Subclass it to add your own.

    Attributes:
        starts_at_batch_times: whether jumps start at the batch's (x_t, t). The teacher's velocity there is computed
            once for all such edges.
        has_length: false if s = t, where no derivative is needed.
    """

    starts_at_batch_times: ClassVar[bool] = True
    has_length: ClassVar[bool] = True

    @property
    def reads_data(self) -> bool:
        """Whether some jumps start after t = 0, at points x_t that depend on the data x_1."""
        return True

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
    """s = t: jumps of length 0, where the mean velocity equals the instantaneous velocity.

    Args:
        times: the distribution of t; None for the batch's times.
        length: s - t, from 0 to 1. Shortcut models take the mean velocity of their shortest step for the instantaneous
            velocity.

    Raises:
        ValueError: if length is out of its range.
    """

    times: TimeLaw | None = None
    length: float = 0.0
    has_length = False

    def __post_init__(self) -> None:
        if not 0 <= self.length <= 1:
            raise ValueError(f"length must be from 0 to 1: got {self.length}")

    @property
    def starts_at_batch_times(self) -> bool:  # type: ignore[override]
        """Whether t is the batch's time."""
        return self.times is None

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (t, t + length)."""
        t = t if self.times is None else self.times.draw(len(t), generator).to(t)
        return Times(t, (t + self.length).clamp(max=DATA) if self.length else t)


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

    @property
    def reads_data(self) -> bool:
        """Whether r is above 0 at first."""
        return self.start > 0

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
    """The whole triangle: s has a law restricted to [t, 1], for the batch's t.

    If t is the `SmallerOfTwo` times of the same law, (t, s) are the smaller and the larger of two independent times.

    Args:
        end_times: the law of s; uniform by default.
    """

    end_times: TimeLaw = field(default_factory=Uniform)

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (t, s) with s = Q(F(t) + (1 - F(t)) U) for the law's levels F and quantiles Q."""
        first = self.end_times.levels(t)
        s = self.end_times.quantiles(first + (1 - first) * stratified(len(t), generator).to(t))
        return Times(t, torch.maximum(s, t))


@dataclass(frozen=True)
class Lengths(Edge):
    """The whole triangle by a law of the length s - t; t is uniform over [0, 1 - length] (AYF, arXiv 2506.14603).

    Args:
        lengths: the law of s - t.
    """

    lengths: TimeLaw = field(default_factory=Uniform)
    starts_at_batch_times = False

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (t, t + length)."""
        length = self.lengths.draw(len(t), generator).to(t)
        start = (DATA - length) * stratified(len(t), generator).to(t)
        return Times(start, (start + length).clamp(max=DATA))


@dataclass(frozen=True)
class DyadicSteps(Edge):
    """Steps of length 1, 1/2, ..., 2 / finest from multiples of their length (shortcut models, arXiv 2410.12557).

    Args:
        finest: number of the shortest steps, whose length is learned by flow matching: a power of 2, at least 2.

    Raises:
        ValueError: if finest is not a power of 2.
    """

    finest: int = 128
    starts_at_batch_times = False

    def __post_init__(self) -> None:
        if self.finest < 2 or self.finest & (self.finest - 1):
            raise ValueError(f"finest must be a power of 2, at least 2: got {self.finest}")

    def draw(self, t: Time, step: int, generator: torch.Generator) -> Times:
        """Return (k / n, (k + 1) / n) for n = 2^j, with j and k uniform."""
        levels = self.finest.bit_length() - 1
        count = 2 ** (stratified(len(t), generator).to(t) * levels).floor().clamp(max=levels - 1)
        start = (stratified(len(t), generator).to(t) * count).floor().clamp(max=count - 1) / count
        return Times(start, start + 1 / count)
