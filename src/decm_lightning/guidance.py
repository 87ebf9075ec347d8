"""Classifier-free guidance with velocity normalization and a guidance interval."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from decm_lightning.conditions import join, select
from decm_lightning.path import expand
from decm_lightning.types import Condition, Sample, Time, VelocityField


@dataclass(frozen=True)
class Guidance:
    """The scale, limit and interval of classifier-free guidance (arXiv 2207.12598).

        v = v_cond + (scale - 1) min(1, limit / rms(dv)) dv,  dv = v_cond - v_null

    on all channels for t in the interval; outside the interval v = v_cond. `limit` is the paper's eta. It bounds the
    root mean square over all elements of a sample instead of the norm, so that it does not depend on the resolution.

    >>> Guidance(scale=2.0, limit=1.0, interval=(0.0, 0.75)).passes
    1.75

    Args:
        scale: guidance weight, at least 0; 1 disables guidance and needs no null pass.
        limit: upper bound on rms(dv), above 0; None disables the bound.
        interval: the first and last guided time, 0 <= first <= last <= 1 (arXiv 2404.07724).

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
            raise ValueError(f"guidance interval must satisfy 0 <= first <= last <= 1: got {self.interval}")

    @property
    def passes(self) -> float:
        """Average number of evaluations of the field for one guided velocity, with t uniform over [0, 1]."""
        first, last = self.interval
        return 1.0 if self.scale == 1 else 1.0 + last - first


ROUNDED_UP = 8
"""The number of null rows is a multiple of this, so that compilers and CUDA graphs see few batch sizes."""


class GuidedField:
    """The guided velocity, itself a velocity field.

    One call of the field evaluates the conditional rows and, for times in the interval, the null rows. The guided rows
    are selected on the device of the times, so times on the CPU, as in training, avoid a GPU synchronization. The
    velocity has the dtype of x_t.

    Args:
        field: the velocity to guide.
        null: returns the null condition for each row of a condition.
        guidance: scale, limit and interval.
    """

    def __init__(self, field: VelocityField, null: Callable[[Condition], Condition], guidance: Guidance) -> None:
        self.field = field
        self.null = null
        self.guidance = guidance

    def __call__(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return the guided v, (b, *d); t may be on the CPU when x_t is not."""
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
        """Return the rows in the interval, padded with other rows to a multiple of 8, and a mask of the rows in it."""
        first, last = self.guidance.interval
        inside = (t >= first) & (t <= last)
        # For the interval [0, 1] the count is known without reading the times, which may be on a GPU.
        count = len(t) if (first, last) == (0, 1) else int(inside.sum())
        padded = min(len(t), -(-count // ROUNDED_UP) * ROUNDED_UP)
        rows = inside.logical_not().to(torch.uint8).argsort(stable=True)[:padded]
        return rows, inside[rows]

    def _correction(self, dv: Sample) -> Sample:
        factor = self.guidance.scale - 1
        if self.guidance.limit is None:
            return factor * dv
        rms = expand(dv.flatten(1).square().mean(1).sqrt(), dv)
        # An rms of 0 gives limit / 0 = inf, which is clamped to 1.
        return factor * (self.guidance.limit / rms).clamp(max=1) * dv
