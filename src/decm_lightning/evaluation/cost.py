"""Record the number and the times of network evaluations while samples are generated."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn

from decm_lightning.evaluation.source import SampleSource
from decm_lightning.teachers import Teacher

SHOWN = 8
"""The largest number of steps that are listed."""


@dataclass
class SamplingCost:
    """Counts network evaluations while samples are generated.

    Args:
        samples: number of samples generated while recording.

    Attributes:
        rows: number of rows evaluated by the networks; a guided step evaluates two rows per sample.
        times: (t, s) of each evaluation of the averaged network, in order.
    """

    samples: int
    rows: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)

    @property
    def nfe(self) -> float | None:
        """Network evaluations per sample; None if none were recorded."""
        return self.rows / self.samples if self.rows else None

    @property
    def steps(self) -> str:
        """The times of the averaged network's evaluations, such as "0 -> 0.75, 0.75 -> 1"; "" if there were none."""
        shown = [f"{t:.4g} -> {s:.4g}" for t, s in self.times[:SHOWN]]
        return ", ".join([*shown, "..."] if len(self.times) > SHOWN else shown)

    @contextmanager
    def record(self, source: SampleSource) -> Iterator[None]:
        """Record all evaluations within the block."""

        def on_average(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x_t, t, s = list(chain(args, kwargs.values()))[:3]
            self.rows += len(x_t)
            self.times.append((t[0].item(), s[0].item()))

        def on_teacher(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.rows += len(next(chain(args, kwargs.values())))

        teacher = source.teacher
        modules = [] if teacher is None else teacher.evaluated_modules()
        with ExitStack() as hooks:
            hooks.callback(source.average.register_forward_pre_hook(on_average, with_kwargs=True).remove)
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(on_teacher, with_kwargs=True).remove)
            if teacher is not None and not modules:
                hooks.enter_context(self._velocity(teacher))
            yield

    @contextmanager
    def _velocity(self, teacher: Teacher) -> Iterator[None]:
        velocity: Callable[..., Tensor] = teacher.velocity

        def counted(x_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.rows += len(x_t)
            return velocity(x_t, *args, **kwargs)

        teacher.velocity = counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            # Remove the attribute, which hides the class's method.
            del teacher.velocity
