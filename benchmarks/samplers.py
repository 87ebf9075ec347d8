"""Samplers for comparisons: `student/benchmarks.samplers.euler_first/4` in a spec."""

from itertools import pairwise

import torch

from decm_lightning.path import time_dtype
from decm_lightning.samplers import consistency
from decm_lightning.types import Condition, FlowMapNetwork, Sample


@torch.no_grad()
def euler_first(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: torch.Generator | None = None,
    s1: float = 0.9,
) -> Sample:
    """Mix as a reader describes it: Euler steps from the noise to s1, then one step of the consistency map to data.

    Args:
        student: the flow map.
        x_0: noise, (b, *d).
        condition: labels or captions.
        steps: network evaluations, at least 1.
        generator: not used: nothing is re-noised.
        s1: the time of the last step, in (0, 1).
    """
    if steps == 1:
        return consistency(student, x_0, condition, 1)
    x, times = x_0, torch.linspace(0, s1, steps, dtype=torch.float64).tolist()
    for t, s in pairwise(times):
        start = torch.full((len(x),), t, dtype=time_dtype(x), device=x.device)
        x = x + (s - t) * student(x, start, start, condition)
    start = torch.full((len(x),), s1, dtype=time_dtype(x), device=x.device)
    return x + (1 - s1) * student(x, start, torch.ones_like(start), condition)
