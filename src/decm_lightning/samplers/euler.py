"""Euler: the student as an ordinary velocity field, on the diagonal of the triangle."""

from collections.abc import Sequence

import torch

from decm_lightning.path import DATA, NOISE
from decm_lightning.samplers.consistency import Generators
from decm_lightning.samplers.steps import check_shift, check_steps, check_times, euler_steps, shifted
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time, VelocityField


@torch.no_grad()
def euler(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    times: Sequence[float] | None = None,
    *,
    shift: float = 1.0,
) -> Sample:
    """Return samples by Euler's method for dx/dt = u(x, t, t) from t = 0 to 1.

        x_t' = x_t + (t' - t) u(x_t, t, t)

    This is how flow-matching teachers are sampled. The error falls as 1 / steps. It uses only what flow matching
    trains: samples are good at many steps and poor at few.

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels or captions, one for each row, or None.
        steps: network evaluations, at least 1.
        generator: not used, since no noise is added.
        times: the steps - 1 times between two steps, increasing within (0, 1); None for k / steps, bent by `shift`.
        shift: above 0; 1 leaves the default times as they are, see `steps.shifted`.

    Raises:
        ValueError: if steps, times or shift is out of its range, or times and shift are both given.
    """
    check_steps(steps)
    check_shift(shift)
    if times is None:
        times = [shifted(t, shift) for t in torch.linspace(NOISE, DATA, steps + 1, dtype=torch.float64).tolist()[1:-1]]
    else:
        times = check_times(times, steps, shift=shift == 1)
    return euler_steps(student, x_0, [NOISE, *times, DATA], condition)


def flow_map_of(field: VelocityField) -> FlowMapNetwork:
    """Return a velocity field as a student that ignores s: what Euler needs to sample a teacher."""

    def network(x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        return field(x_t, t, condition)

    return network
