"""A flow with a closed-form velocity as a teacher, for tests and notebooks."""

from decm_lightning.flows import GaussianMixture
from decm_lightning.teachers.teacher import FormulaTeacher
from decm_lightning.types import Captions, Condition, Labels, Sample, Time


class ExactTeacher(FormulaTeacher):
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


def _labels(condition: Condition) -> Labels:
    if isinstance(condition, Captions):
        raise ValueError("the components of an exact flow are its classes: pass labels, not captions")
    return condition
