"""The Mix sampler, which uses the noise edge, the diagonal and the data edge of the triangle in turn."""

from collections.abc import Sequence

import torch

from decm_lightning.path import DATA, NOISE
from decm_lightning.samplers.consistency import Generators
from decm_lightning.samplers.steps import (
    check_shift,
    check_steps,
    check_times,
    euler_steps,
    flow_map_step,
    shifted,
)
from decm_lightning.types import Condition, FlowMapNetwork, Sample


@torch.no_grad()
def mix(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    times: Sequence[float] | None = None,
    *,
    s1: float | None = None,
    shift: float = 1.0,
) -> Sample:
    """Generate samples by DE-CM's Mix. The paper (arXiv 2602.10764) does not define it; this definition is ours.

        x_s1 = f(x_0, 0, s1)                        one jump on the noise edge
        x_t' = x_t + (t' - t) u(x_t, t, t)          steps - 2 Euler steps on the diagonal, from s1
        x_1 = f(x_t, t, 1)                          one jump on the data edge

    No noise is added. With 1 step the result is f(x_0, 0, 1). The default times divide [s1, 1] into steps - 1 equal
    parts. The last step is a jump because an Euler step is much less accurate there.

    >>> from decm_lightning.flows import Gaussian
    >>> x_0 = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> mix(Gaussian(mean=3.0, std=0.5), x_0, None, steps=2, s1=0.6).round(decimals=4).flatten()  # exact: 3 + x_0 / 2
    tensor([2.5000, 3.0000, 3.5000])

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels or captions, one per row, or None.
        steps: network evaluations, at least 1.
        generator: ignored, because no noise is added.
        times: the steps - 1 times between steps, from s1 on, increasing in (0, 1); None for the default times.
        s1: end time of the first step, in (0, 1); None for 0.75 up to 3 steps, 0.7 for 4 to 7, and 0.5 from 8.
        shift: above 0; changes the default times after s1, see `steps.shifted`.

    Raises:
        ValueError: if steps, times, s1 or shift is out of its range, or times is passed with s1 or shift.
    """
    times = mix_times(steps, times, s1=s1, shift=shift)
    if not times:
        return flow_map_step(student, x_0, NOISE, DATA, condition)
    x_t = flow_map_step(student, x_0, NOISE, times[0], condition)
    return flow_map_step(student, euler_steps(student, x_t, times, condition), times[-1], DATA, condition)


def mix_times(
    steps: int, times: Sequence[float] | None = None, *, s1: float | None = None, shift: float = 1.0
) -> list[float]:
    """Return the steps - 1 times between the steps of `mix`, which documents the arguments and errors."""
    check_steps(steps)
    check_shift(shift)
    if s1 is not None and not 0 < s1 < 1:
        raise ValueError(f"s1 must be between 0 and 1, both excluded: got {s1}")
    if times is None:
        first = shifted(_default_s1(steps) if s1 is None else s1, 1 / shift)
        return [shifted(t, shift) for t in torch.linspace(first, DATA, steps, dtype=torch.float64).tolist()[:-1]]
    return check_times(times, steps, s1=s1 is None, shift=shift == 1)


def _default_s1(steps: int) -> float:
    if steps <= 3:
        return 0.75
    return 0.7 if steps < 8 else 0.5
