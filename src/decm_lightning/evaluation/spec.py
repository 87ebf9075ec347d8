"""The specification of samples, written "model/sampler/steps?option=value"."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from decm_lightning import samplers
from decm_lightning.samplers.options import read_options, write_options
from decm_lightning.samplers.steps import check_steps
from decm_lightning.types import Sample

FORM = "model/sampler/steps, such as student/mix/2 or student/mix/2?s1=0.6"


@dataclass(frozen=True)
class SamplingSpec:
    """Specifies how samples are generated: "model/sampler/steps", and "?name=value&name=value" for options.

    Values are YAML scalars or lists of them.

    Example:
        >>> spec = SamplingSpec.parse("student/consistency/3?times=[0.2,0.6]")
        >>> spec.model, spec.steps, spec.options
        ('student', 3, {'times': [0.2, 0.6]})

    Args:
        model: a name that the module's `models()` has, such as "student" or "teacher".
        sampler: a name or a class path that `samplers.sampler` takes, such as "mix" or "my_module.heun".
        steps: steps of the sampler, at least 1.
        options: the sampler's options by name.

    Raises:
        ValueError: if the sampler or an option does not exist, the sampler refuses a value, or steps is below 1.
    """

    model: str
    sampler: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            self._check()
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(f"spec {str(self)!r}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "SamplingSpec":
        """Return the spec of a text, as written by `str`.

        Raises:
            ValueError: if the text has another form, or as the class does.
        """
        head, _, query = text.partition("?")
        model, sampler, steps = parts if len(parts := head.split("/")) == 3 else ("", "", "")
        if not (model and sampler and steps.isdecimal()):
            raise ValueError(f"a spec must be {FORM}: got {text!r}")
        return cls(model, sampler, int(steps), read_options(query, text))

    @property
    def query(self) -> str:
        """The options as text, "" without options."""
        return write_options(self.options)

    def function(self) -> Callable[..., Sample]:
        """Return the sampler with its options."""
        return samplers.sampler(self.sampler, **self.options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.model}/{self.sampler}/{self.steps}{self.query}"

    def _check(self) -> None:
        check_steps(self.steps)
        function = self.function()
        # Invalid options fail now rather than after hours. An external sampler may need a real student.
        if self.options and "." not in self.sampler:
            generators = [torch.Generator()]
            function(lambda x_t, t, s, condition: x_t, torch.zeros(1, 1), None, self.steps, generator=generators)
