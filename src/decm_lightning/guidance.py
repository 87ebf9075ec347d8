"""Classifier-free guidance with velocity normalization and an interval: a VelocityField around a VelocityField."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decm_lightning.conditions import join, select
from decm_lightning.path import expand
from decm_lightning.types import Condition, Sample, Time, VelocityField


@dataclass(frozen=True)
class Guidance:
    """How strongly, how far and when a velocity is guided (classifier-free guidance, arXiv 2207.12598).

        v = v_cond + (scale - 1) min(1, limit / rms(dv)) dv,  dv = v_cond - v_null

    on all channels, for t in the interval; elsewhere v = v_cond. The limit is the paper's eta, on the root mean square
    over all elements of a sample rather than the norm, so that its value does not grow with the resolution.

    Args:
        scale: guidance weight, at least 0; 1 is no guidance, and the null pass is then left out.
        limit: bound on rms(dv), above 0; None for no bound.
        interval: the times (first, last), 0 <= first <= last <= 1, at which guidance is on (arXiv 2404.07724).

    Raises:
        ValueError: if a value is out of its range.
    """

    scale: float = 1.0
    limit: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"guidance scale must be at least 0: got {self.scale}")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"guidance limit must be above 0: got {self.limit}")
        first, last = self.interval
        if not 0 <= first <= last <= 1:
            raise ValueError(f"guidance interval must lie in order within [0, 1]: got {self.interval}")

    @property
    def passes(self) -> float:
        """Passes of the field for one guided velocity, on average over uniform times."""
        first, last = self.interval
        return 1.0 if self.scale == 1 else 1.0 + last - first


ROUNDED_UP = 8
"""Null rows come in multiples of this: few different batches for compilers and CUDA graphs."""


class GuidedField:
    """The guided velocity. One call of the field serves conditional and null rows, the latter only in the interval.

    The times decide on the device that they are on which rows are guided: a network on a GPU is not waited for if they
    are on the CPU, as in training. The velocity has the dtype of x_t whatever the field returns.

    Args:
        field: the velocity to guide.
        null: turns a condition into "no condition" of the same length.
        guidance: scale, limit and interval.
    """

    def __init__(self, field: VelocityField, null: Callable[[Condition], Condition], guidance: Guidance) -> None:
        self.field = field
        self.null = null
        self.guidance = guidance

    def __call__(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return the guided v, (b, *d); t may be on the CPU whatever the device of x_t."""
        guided = condition is not None and self.guidance.scale != 1
        rows, inside = self._guided_rows(t) if guided else (t[:0], t[:0])
        t = t.to(x_t.device, non_blocking=True)
        if len(rows) == 0:
            return self.field(x_t, t, condition).to(x_t.dtype)
        rows, inside = (values.to(x_t.device, non_blocking=True) for values in (rows, inside))
        conditions = join([condition, self.null(select(condition, rows))])
        both = self.field(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), conditions).to(x_t.dtype)
        v_cond, v_null = both.split([len(t), len(rows)])
        correction = self._correction(v_cond[rows] - v_null)
        inside = inside.reshape(-1, *(1,) * (x_t.ndim - 1))
        return v_cond.index_add(0, rows, torch.where(inside, correction, 0))

    def _guided_rows(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return the rows in the interval, filled up with others to a multiple of 8, and which of them are in it."""
        first, last = self.guidance.interval
        inside = (t >= first) & (t <= last)
        # All of [0, 1] is decided without a look at the times, which may be on a GPU.
        count = len(t) if (first, last) == (0, 1) else int(inside.sum())
        padded = min(len(t), -(-count // ROUNDED_UP) * ROUNDED_UP)
        rows = inside.logical_not().to(torch.uint8).argsort(stable=True)[:padded]
        return rows, inside[rows]

    def _correction(self, dv: Sample) -> Sample:
        factor = self.guidance.scale - 1
        if self.guidance.limit is None:
            return factor * dv
        rms = expand(dv.flatten(1).square().mean(1).sqrt(), dv)
        # An rms of 0 gives limit / 0 = inf, which the clamp takes to 1.
        return factor * (self.guidance.limit / rms).clamp(max=1) * dv
