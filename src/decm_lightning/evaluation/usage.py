"""What one sample costs and which times its sampler uses, both recorded while samples are generated."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn

from decm_lightning.evaluation.spec import Cell
from decm_lightning.teachers import Teacher


@dataclass
class Usage:
    """The network evaluations of some samples.

    Args:
        samples: number of samples that are generated while it records.

    Attributes:
        rows: rows that the networks evaluated: a guided step evaluates two for each sample.
        times: (t, s) of each evaluation of the averaged network, in order.
    """

    samples: int
    rows: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)

    @property
    def nfe(self) -> float | None:
        """Network evaluations of one sample; None if none was seen."""
        return self.rows / self.samples if self.rows else None

    @contextmanager
    def record(self, average: nn.Module, teacher: Teacher | None) -> Iterator[None]:
        """Record all evaluations within the block."""

        def on_average(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x_t, t, s = list(chain(args, kwargs.values()))[:3]
            self.rows += len(x_t)
            self.times.append((t[0].item(), s[0].item()))

        def on_teacher(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.rows += len(next(chain(args, kwargs.values())))

        modules = [] if teacher is None else teacher.evaluated_modules()
        with ExitStack() as hooks:
            hooks.callback(average.register_forward_pre_hook(on_average, with_kwargs=True).remove)
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
            # Until here it hides the class's method.
            del teacher.velocity

    def options(self, cell: Cell) -> str:
        """Return the options of the cell's sampler, "" if it has none: the end time of its first step, re-noise times.

        The consistency sampler re-noises before every step from the second, the re-noised mix from the third.
        """
        if cell.sampler == "euler" or len(self.times) < 2:
            return ""
        starts = [f"{t:.4g}" for t, _ in self.times]
        s1 = f"s1 = {self.times[0][1]:.4g}"
        if cell.sampler == "mix":
            return s1
        first = 1 if cell.sampler == "consistency" else 2
        renoised = f"re-noised at t = {', '.join(starts[first:])}" if starts[first:] else ""
        return renoised if cell.sampler == "consistency" else ", ".join(filter(None, (s1, renoised)))
