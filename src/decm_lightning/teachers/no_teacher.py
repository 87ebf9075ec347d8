"""Training without a teacher, on the velocity of each row's own path."""

from typing import NoReturn

from decm_lightning.teachers.teacher import FormulaTeacher
from decm_lightning.types import Condition, Sample, Time


class NoTeacher(FormulaTeacher):
    """Takes the place of a teacher: the velocity of a row at (x_t, t) is x_1 - x_0, as MeanFlow is published.

    Its mean over all rows with the same x_t is the marginal velocity, so losses that are linear in the velocity are
    unbiased. There is no velocity at other points, so the end identity and guidance are not available.
    """

    def velocity(self, x_t: Sample, t: Time, condition: Condition) -> NoReturn:
        """Refuse.

        Raises:
            ValueError: always, because x_1 - x_0 is known on the path of a row only.
        """
        raise ValueError("without a teacher the velocity is known at the rows' own points only: pass a teacher")

    def null(self, condition: Condition) -> Condition:
        """Return the condition, because nothing is guided."""
        return condition
