"""The Euler sampler, which uses the student as a velocity field, on the diagonal of the triangle."""

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
    """Generate samples by Euler's method for dx/dt = u(x, t, t) from t = 0 to 1.

        x_t' = x_t + (t' - t) u(x_t, t, t)

    Flow-matching teachers are sampled in this way. The error falls as 1 / steps. Euler uses only the diagonal, which
    flow matching trains: samples are good at many steps and poor at few.

    >>> from decm_lightning.flows import Gaussian
    >>> x_0 = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> euler(Gaussian(mean=3.0, std=0.5), x_0, None, steps=1000).round(decimals=1).flatten()  # exact: 3 + x_0 / 2
    tensor([2.5000, 3.0000, 3.5000])

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels or captions, one per row, or None.
        steps: network evaluations, at least 1.
        generator: ignored, because no noise is added.
        times: the steps - 1 times between steps, increasing in (0, 1); None for k / steps, changed by `shift`.
        shift: above 0; 1 keeps the default times, see `steps.shifted`.

    Raises:
        ValueError: if steps, times or shift is out of its range, or times and shift are both passed.
    """
    return euler_steps(student, x_0, [NOISE, *euler_times(steps, times, shift=shift), DATA], condition)


def euler_times(steps: int, times: Sequence[float] | None = None, *, shift: float = 1.0) -> list[float]:
    """Return the steps - 1 times between the steps of `euler`, which documents the arguments and errors."""
    check_steps(steps)
    check_shift(shift)
    if times is None:
        return [shifted(t, shift) for t in torch.linspace(NOISE, DATA, steps + 1, dtype=torch.float64).tolist()[1:-1]]
    return check_times(times, steps, shift=shift == 1)


def flow_map_of(field: VelocityField) -> FlowMapNetwork:
    """Return a velocity field as a student that ignores s, so that `euler` can sample a teacher."""

    def network(x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        return field(x_t, t, condition)

    return network
