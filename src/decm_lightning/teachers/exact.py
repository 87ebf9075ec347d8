"""A flow with a closed-form velocity as a teacher, for tests and notebooks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from decm_lightning.flows import GaussianMixture
from decm_lightning.networks import Network
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Captions, Condition, Labels, Sample, Time


class ExactTeacher(Teacher):
    """A teacher with the exact velocity of a Gaussian mixture; the components are the classes."""

    def __init__(self, flow: GaussianMixture) -> None:
        self.flow = flow

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return the exact velocity.

        Raises:
            ValueError: if the condition is Captions.
        """
        return self.flow(x_t, t, _labels(condition))

    def null(self, condition: Condition) -> Condition:
        """Return the condition that selects the whole mixture."""
        return self.flow.null(_labels(condition))

    def networks(self) -> list[Network]:
        """Return no networks."""
        return []

    def student(self) -> Network:
        """Raise an error: a formula has no weights to initialize a student from.

        Raises:
            ValueError: always.
        """
        raise ValueError("an exact flow has no weights to initialize a student from: pass Distiller(student=...)")

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Do nothing: the flow follows the device and dtype of its input."""
        return self


def _labels(condition: Condition) -> Labels:
    if isinstance(condition, Captions):
        raise ValueError("the components of an exact flow are its classes: pass labels, not captions")
    return condition
