"""Classifier-free guidance with velocity normalisation and an interval: a VelocityField around a VelocityField."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

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


class GuidedField:
    """The guided velocity. One call of the field serves conditional and null rows, the latter only in the interval.

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
        """Return the guided v, (b, *d)."""
        first, last = self.guidance.interval
        rows = torch.nonzero((t >= first) & (t <= last)).flatten()
        if condition is None or self.guidance.scale == 1 or len(rows) == 0:
            return self.field(x_t, t, condition)
        conditions = join([condition, self.null(select(condition, rows))])
        both = self.field(torch.cat([x_t, x_t[rows]]), torch.cat([t, t[rows]]), conditions)
        v_cond, v_null = both.split([len(t), len(rows)])
        return v_cond.index_add(0, rows, self._correction(v_cond[rows] - v_null))

    def _correction(self, dv: Sample) -> Sample:
        factor = self.guidance.scale - 1
        if self.guidance.limit is None:
            return factor * dv
        rms = expand(dv.flatten(1).square().mean(1).sqrt(), dv)
        # An rms of 0 gives limit / 0 = inf, which the clamp takes to 1.
        return factor * (self.guidance.limit / rms).clamp(max=1) * dv
