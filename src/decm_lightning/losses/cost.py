"""What a training step costs, counted in passes of the network."""

from dataclasses import dataclass
from math import lcm

from decm_lightning.losses.dual_end import Objective

ROWS = 1024
"""The batch size used for counting: large, so that rounding to whole rows does not show."""


@dataclass(frozen=True)
class Cost:
    """Passes of the network for each sample of the batch, averaged over steps; a forward pass is 1.

    Attributes:
        teacher: forward passes of the teacher, null passes included.
        student: forward passes of the student.
        derivative: forward passes that only carry a tangent: 1 for each row with one.
        backward: 2 for each forward pass of the student.
    """

    teacher: float
    student: float
    derivative: float

    @property
    def backward(self) -> float:
        """The backward pass has two products for each one of the forward pass."""
        return 2 * self.student

    @property
    def total(self) -> float:
        """All passes."""
        return self.teacher + self.student + self.derivative + self.backward

    def __str__(self) -> str:
        return (
            f"{self.total:.2f} forward passes a sample and step: "
            f"teacher {self.teacher:.2f}, student {self.student:.2f}, "
            f"derivative {self.derivative:.2f}, backward {self.backward:.2f}"
        )


def cost(objective: Objective, guided: float = 1.0) -> Cost:
    """Return what a step of the objective costs with the one-pass engine.

    Args:
        objective: the losses with their batch fractions and how often each is active.
        guided: passes of the teacher for one guided velocity (`Guidance.passes`).
    """
    steps = range(lcm(*(loss.every for loss in objective.losses.values())))
    teacher = student = derivative = 0.0
    for step in steps:
        rows = objective.rows(ROWS)
        # The velocity at x_t is shared by all losses that start there.
        teacher += len(objective.teacher_rows(step, ROWS))
        for name, loss in objective.active_losses(step).items():
            count, reads = len(rows[name]), loss.velocities
            student += count
            derivative += count * loss.edge.has_length
            teacher += count * (reads.start + reads.end)
    each = 1 / (len(steps) * ROWS)
    return Cost(guided * teacher * each, student * each, derivative * each)
