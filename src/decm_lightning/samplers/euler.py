"""Euler: the student as an ordinary velocity field, along the diagonal of the triangle."""

from itertools import pairwise

import torch

from decm_lightning.path import DATA, NOISE, jump
from decm_lightning.samplers.consistency import Generators
from decm_lightning.samplers.steps import at, check_steps
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time, VelocityField


def euler(
    student: FlowMapNetwork, x_0: Sample, condition: Condition, steps: int, generator: Generators | None = None
) -> Sample:
    """Return samples by x <- x + (s - t) u(x, t, t) over `steps` equal parts of [0, 1].

    The error falls as 1 / steps. It uses only what flow matching trains: good at many steps, poor at few.

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels, (b,), or None.
        steps: network evaluations, at least 1.
        generator: not used: no noise is added.

    Raises:
        ValueError: if steps is below 1.
    """
    check_steps(steps)
    grid = torch.linspace(NOISE, DATA, steps + 1, dtype=torch.float64).tolist()
    x_t = x_0
    for start, end in pairwise(grid):
        t = at(start, x_t)
        x_t = jump(x_t, student(x_t, t, t, condition), t, at(end, x_t))
    return x_t


def flow_map_of(field: VelocityField) -> FlowMapNetwork:
    """Return a velocity field as a student that ignores s: what Euler needs to sample a teacher."""

    def network(x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        return field(x_t, t, condition)

    return network
