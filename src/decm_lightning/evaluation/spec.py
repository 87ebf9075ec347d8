"""Cells of the table of quality, each a (model, sampler, steps)."""

from dataclasses import dataclass
from typing import cast, get_args

from decm_lightning.samplers import SamplerName

SAMPLERS = get_args(SamplerName)


@dataclass(frozen=True)
class Cell:
    """One way of drawing samples, written "model/sampler/steps".

    Args:
        model: a name that the module's `models()` has, such as "student" or "teacher".
        sampler: "euler", "consistency" or "mix".
        steps: steps of the sampler, at least 1.
    """

    model: str
    sampler: SamplerName
    steps: int

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Read what `str` writes.

        Raises:
            ValueError: if the text is of another form.
        """
        model, sampler, steps = parts if len(parts := text.split("/")) == 3 else ("", "", "")
        if not model or sampler not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
            form = "model/sampler/steps, such as student/mix/2"
            limits = f"with sampler one of {', '.join(SAMPLERS)} and steps at least 1"
            raise ValueError(f"a cell must be {form}, {limits}: got {text!r}")
        return cls(model, cast(SamplerName, sampler), int(steps))

    def __str__(self) -> str:
        return f"{self.model}/{self.sampler}/{self.steps}"
