"""The cost of a training step, counted in forward passes of the network."""

from dataclasses import dataclass
from math import lcm

from decm_lightning.losses.objective import Objective

ROWS = 1024
"""The batch size used for counting, large enough to make the rounding to whole rows negligible."""


@dataclass(frozen=True)
class Cost:
    """Network passes per sample of the batch, averaged over steps; a forward pass counts 1.

    Attributes:
        teacher: forward passes of the teacher, including null passes for guidance.
        student: forward passes of the student with a graph.
        derivative: the tangent's share of forward passes: 1 per row with a tangent.
        target: forward passes without a graph that compute the middle identity's target.
        backward: 2 per forward pass of the student with a graph.
    """

    teacher: float
    student: float
    derivative: float
    target: float = 0.0

    @property
    def backward(self) -> float:
        """Twice the forward passes of the student: two matrix products for each one of the forward pass."""
        return 2 * self.student

    @property
    def total(self) -> float:
        """The sum of all passes."""
        return self.teacher + self.student + self.derivative + self.target + self.backward

    def __str__(self) -> str:
        targets = f"targets {self.target:.2f}, " if self.target else ""
        return (
            f"{self.total:.2f} forward passes per sample and step: teacher {self.teacher:.2f}, "
            f"student {self.student:.2f}, derivative {self.derivative:.2f}, {targets}backward {self.backward:.2f}"
        )


def cost(objective: Objective, guided: float = 1.0) -> Cost:
    """Return the cost of one training step of the objective with the dual engine.

    Args:
        objective: the losses with their batch fractions and how often each is active.
        guided: teacher passes per guided velocity (`Guidance.passes`).
    """
    steps = _steps(objective)
    teacher = student = derivative = target = 0.0
    for step in steps:
        rows = objective.rows(ROWS)
        # The velocity at x_t is shared by all losses that start there.
        teacher += len(objective.teacher_rows(step, ROWS))
        for name, loss in objective.active_losses(step).items():
            count, reads = len(rows[name]), loss.velocities
            student += count
            derivative += count * loss.needs_derivative
            teacher += count * (reads.start + reads.end)
            if loss.middle_weight:
                target += count * (1 + (loss.middle.first == "student"))
    each = 1 / (len(steps) * ROWS)
    return Cost(guided * teacher * each, student * each, derivative * each, target * each)


def _steps(objective: Objective) -> list[int]:
    """Return the steps to average over: one period of the losses, at a hundred places of the longest schedule."""
    period = lcm(*(loss.every for loss in objective.losses.values()))
    length = max(loss.middle.alpha.steps or 0 for loss in objective.losses.values())
    places = [length * part // 100 for part in range(100)] if length else [0]
    return [place // period * period + step for place in places for step in range(period)]
