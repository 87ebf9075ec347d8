"""A flow with a closed-form velocity as a teacher: for tests and notebooks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from decm_lightning.flows import GaussianMixture
from decm_lightning.networks import Network
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Captions, Condition, Labels, Sample, Time


class ExactTeacher(Teacher):
    """The exact velocity of a Gaussian mixture, whose components are its classes.

    Args:
        flow: the mixture.
    """

    def __init__(self, flow: GaussianMixture) -> None:
        self.flow = flow

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return the flow's own velocity.

        Raises:
            ValueError: if the condition is of captions.
        """
        return self.flow(x_t, t, _labels(condition))

    def null(self, condition: Condition) -> Condition:
        """Return the condition that leaves the mixture whole."""
        return self.flow.null(_labels(condition))

    def networks(self) -> list[Network]:
        """Return none."""
        return []

    def student(self) -> Network:
        """Refuse: a formula has no weights to start from.

        Raises:
            ValueError: always.
        """
        raise ValueError("an exact flow has no network to start a student from: give Distiller(student=...)")

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Do nothing: the flow follows the device and dtype of its input."""
        return self


def _labels(condition: Condition) -> Labels:
    if isinstance(condition, Captions):
        raise ValueError("the components of an exact flow are its classes: give labels, not captions")
    return condition
