"""Teachers that are formulas instead of networks: a closed-form velocity, and the velocity of each row's own path."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from decm_lightning.flows import GaussianMixture
from decm_lightning.networks import Network
from decm_lightning.teachers.teacher import Teacher
from decm_lightning.types import Captions, Condition, Labels, Sample, Time


class FormulaTeacher(Teacher):
    """A velocity without a network, which follows the device and dtype of its input."""

    def __init__(self) -> None:
        pass

    def networks(self) -> list[Network]:
        """Return no networks."""
        return []

    def student(self) -> NoReturn:
        """Refuse: a formula has no weights for a student to start from."""
        raise ValueError(f"{type(self).__name__} has no network to start from: pass Distiller(student=...)")

    def apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Do nothing."""
        return self


class ExactTeacher(FormulaTeacher):
    """The exact velocity of a Gaussian mixture, for tests and notebooks; the components are the classes."""

    def __init__(self, flow: GaussianMixture) -> None:
        self.flow = flow

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return the exact velocity."""
        return self.flow(x_t, t, _labels(condition))

    def null(self, condition: Condition) -> Condition:
        """Return the condition that selects the whole mixture."""
        return self.flow.null(_labels(condition))


class NoTeacher(FormulaTeacher):
    """Takes the place of a teacher: the velocity of a row at (x_t, t) is x_1 - x_0, as MeanFlow is published.

    Its mean over all rows with the same x_t is the marginal velocity, so losses that are linear in the velocity are
    unbiased. The velocity at other points is unknown, so the end identity and guidance are not available.
    """

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> NoReturn:
        """Refuse: x_1 - x_0 is known on the path of a row only."""
        raise ValueError("without a teacher the velocity is known at the rows' own points only: pass a teacher")

    def null(self, condition: Condition) -> Condition:
        """Return the condition, because nothing is guided."""
        return condition


def _labels(condition: Condition) -> Labels:
    if isinstance(condition, Captions):
        raise ValueError("the components of an exact flow are its classes: pass labels, not captions")
    return condition
