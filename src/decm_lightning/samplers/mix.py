"""Mix: each part of a trajectory on the edge of the triangle where the student was trained for it."""

from itertools import pairwise

import torch

from decm_lightning.path import DATA, NOISE, jump
from decm_lightning.samplers.consistency import Generators
from decm_lightning.samplers.steps import at, check_s1, check_steps, flow_map_step
from decm_lightning.types import Condition, FlowMapNetwork, Sample


def mix(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    s1: float | None = None,
) -> Sample:
    """Return samples by one jump 0 -> s1, Euler from there, and one last jump to data. No new noise.

    The first jump is on the noise edge. [s1, 1] is cut into steps - 1 equal parts: Euler on the diagonal over all but
    the last, then a jump to data on the data edge. One step is the jump 0 -> 1. Ending by Euler instead is far worse.

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels, (b,), or None.
        steps: network evaluations, at least 1.
        s1: end time of the first jump, in (0, 1); None for 0.75 up to 3 steps, 0.7 up to 7, 0.5 from 8 on.

    Raises:
        ValueError: if steps is below 1 or s1 is not in (0, 1).
    """
    check_steps(steps)
    s1 = _default_s1(steps) if s1 is None else s1
    check_s1(s1)
    if steps == 1:
        return flow_map_step(student, x_0, NOISE, DATA, condition)
    grid = torch.linspace(s1, DATA, steps, dtype=torch.float64).tolist()
    x_t = flow_map_step(student, x_0, NOISE, s1, condition)
    for start, end in pairwise(grid[:-1]):
        t = at(start, x_t)
        x_t = jump(x_t, student(x_t, t, t, condition), t, at(end, x_t))
    return flow_map_step(student, x_t, grid[-2], DATA, condition)


def _default_s1(steps: int) -> float:
    if steps <= 3:
        return 0.75
    return 0.7 if steps < 8 else 0.5
