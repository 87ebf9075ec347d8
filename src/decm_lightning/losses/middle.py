"""The middle identity: a step equals two shorter steps. It gives targets without a derivative.

    (s - t) u(x_t, t, s) = (m - t) u(x_t, t, m) + (s - m) u(x_m, m, s),   x_m = f(x_t, t, m),   m = t + alpha (s - t)

Divided by s - t, the target of u is alpha u_1 + (1 - alpha) u_2, with u_1 over [t, m] and u_2 over [m, s].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from decm_lightning.path import expand, jump
from decm_lightning.types import Sample, Time

FlowMap = Callable[[Sample, Time, Time], Sample]
"""u(x_t, t, s) for the conditions of the batch."""


class Fraction(ABC):
    """The part alpha of a step that lies before its middle. Subclass it to add your own.

    Attributes:
        steps: training steps over which alpha changes; None if it does not.
    """

    steps: int | None = None

    @abstractmethod
    def at(self, t: Time, s: Time, step: int, generator: torch.Generator) -> Time:
        """Return alpha in (0, 1] for each row, (b,), at training step `step`."""

    def vanishes(self, step: int) -> bool:
        """Return whether alpha is 0 at training step `step`, where the identity becomes the start identity."""
        return False

    def for_run(self, steps: int | None) -> "Fraction":
        """Return the fraction for a run of `steps` training steps; None if the number is unknown."""
        return self


@dataclass(frozen=True)
class Fixed(Fraction):
    """One alpha for all rows: 1/2 halves each step (shortcut models, arXiv 2410.12557).

    Args:
        alpha: in (0, 1].

    Raises:
        ValueError: if alpha is out of its range.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1]: got {self.alpha}")

    def at(self, t: Time, s: Time, step: int, generator: torch.Generator) -> Time:
        """Return alpha for every row."""
        return torch.full_like(t, self.alpha)


@dataclass(frozen=True)
class Random(Fraction):
    """alpha uniform over (0, 1), drawn for each row (SplitMeanFlow, arXiv 2507.16884)."""

    def at(self, t: Time, s: Time, step: int, generator: torch.Generator) -> Time:
        """Return 1 - U[0, 1)."""
        return 1 - torch.rand(len(t), generator=generator, dtype=torch.float32, device=generator.device).to(t)


@dataclass(frozen=True)
class FixedLength(Fraction):
    """A first part of fixed length: alpha = min(length / (s - t), 1), as in discrete-time consistency models.

    Args:
        length: m - t, in (0, 1].

    Raises:
        ValueError: if length is out of its range.
    """

    length: float

    def __post_init__(self) -> None:
        if not 0 < self.length <= 1:
            raise ValueError(f"length must be in (0, 1]: got {self.length}")

    def at(self, t: Time, s: Time, step: int, generator: torch.Generator) -> Time:
        """Return length / (s - t), at most 1."""
        return (self.length / (s - t).clamp(min=1e-12)).clamp(max=1)


@dataclass(frozen=True)
class Sigmoid(Fraction):
    """alpha = 1 - sigmoid(steepness (step / steps - 1/2)), from 1 to 0 (AlphaFlow, arXiv 2510.20771).

    Below `cutoff` alpha is 0, and above 1 - cutoff it is 1.

    Args:
        steepness: above 0.
        cutoff: in [0, 1/2).
        steps: training steps of the schedule; None for the length of the run.

    Raises:
        ValueError: if a value is out of its range.
    """

    steepness: float = 25.0
    cutoff: float = 0.005
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steepness <= 0 or not 0 <= self.cutoff < 0.5:
            raise ValueError(f"steepness must be above 0 and cutoff in [0, 0.5): got {self.steepness}, {self.cutoff}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1: got {self.steps}")

    def alpha(self, step: int) -> float:
        """Return alpha at a training step; 1 if the length of the schedule is unknown."""
        progress = step / self.steps if self.steps else 0.0
        alpha = 1 - 1 / (1 + math.exp(-self.steepness * (progress - 0.5)))
        return 0.0 if alpha < self.cutoff else 1.0 if alpha > 1 - self.cutoff else alpha

    def at(self, t: Time, s: Time, step: int, generator: torch.Generator) -> Time:
        """Return alpha(step) for every row."""
        return torch.full_like(t, self.alpha(step))

    def vanishes(self, step: int) -> bool:
        """Return whether alpha(step) is 0."""
        return self.alpha(step) == 0

    def for_run(self, steps: int | None) -> "Sigmoid":
        """Return the schedule with its steps filled in."""
        return self if self.steps is not None else replace(self, steps=steps)


@dataclass(frozen=True)
class Composition:
    """The target of u that two shorter steps give, and the fraction alpha of each row."""

    target: Sample
    alpha: Time


@dataclass(frozen=True)
class Middle:
    """How a loss uses the middle identity.

    The residual is g = (u - target) / alpha. For alpha -> 0 it tends to the residual of the start identity, and for
    alpha = 1 with the teacher's first part it is that of flow matching, u - v.

    Args:
        alpha: the fraction of the step that lies before its middle.
        first: u_1 is the "teacher"'s velocity v(x_t, t), an Euler step, or the "student"'s u(x_t, t, m).
        network: the "student" or its "average" (EMA) computes the parts.
        divided: divide the residual by alpha. The published losses use u - target.
        weighted: multiply the loss of each row by alpha.
        limit: bound on each element of x_m and of the target, above 0; None for no bound.

    Raises:
        ValueError: if a value is unknown or out of its range.
    """

    alpha: Fraction = field(default_factory=Fixed)
    first: Literal["teacher", "student"] = "student"
    network: Literal["student", "average"] = "student"
    divided: bool = True
    weighted: bool = False
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.first not in ("teacher", "student") or self.network not in ("student", "average"):
            raise ValueError(f"first must be teacher or student, network student or average: got {self}")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit must be above 0: got {self.limit}")

    def compose(self, u: FlowMap, x_t: Sample, t: Time, s: Time, alpha: Time, v_start: Sample | None) -> Composition:
        """Return alpha u_1 + (1 - alpha) u_2 for the steps from t to s.

        Args:
            u: the mean velocities of the network that computes the parts; it must not record a graph.
            x_t: start points, (b, *d).
            t: start times, (b,).
            s: end times, (b,).
            alpha: fraction of each row, (b,).
            v_start: the teacher's velocity at (x_t, t); None if the student computes the first part.
        """
        m = t + alpha * (s - t)
        u_1 = u(x_t, t, m) if v_start is None else v_start
        u_2 = u(self._bounded(jump(x_t, u_1, t, m)), m, s)
        # Rows with alpha = 1 have no second part: u_2 over a step of length 0 is not used.
        return Composition(self._bounded(torch.lerp(u_2, u_1, expand(alpha, u_1).to(u_1.dtype))), alpha)

    def residual(self, u: Sample, composition: Composition) -> Sample:
        """Return (u - target) / alpha, or u - target if not `divided`."""
        g = u - composition.target
        return g / expand(composition.alpha, g) if self.divided else g

    def _bounded(self, x: Sample) -> Sample:
        return x if self.limit is None else x.clamp(-self.limit, self.limit)
