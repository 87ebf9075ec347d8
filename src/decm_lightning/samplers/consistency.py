"""CM: jump to data, put noise back, jump again, along the data edge of the triangle."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import torch

from decm_lightning.path import DATA, NOISE, interpolate
from decm_lightning.samplers.steps import at, check_steps, flow_map_step
from decm_lightning.types import Condition, FlowMapNetwork, Sample

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator]
"""The source of noise for a batch: one for all rows, or one for each row, whose noise then depends on nothing else."""


def consistency(
    student: FlowMapNetwork,
    x_0: Sample,
    condition: Condition,
    steps: int,
    generator: Generators | None = None,
    times: Sequence[float] | None = None,
) -> Sample:
    """Return samples by x_hat <- f(x_t, t, 1), x_t' <- (1 - t') noise + t' x_hat, for each t' in `times`.

    Put noise back late: the default times are evenly spread over [0.7, 1), that is 0.7 + 0.3 (k - 1) / (steps - 1)
    for k = 1 .. steps - 1. A uniform grid over [0, 1] gets worse with more steps.

    Args:
        student: the network u(x_t, t, s).
        x_0: noise, (b, *d).
        condition: class labels, (b,), or None.
        steps: network evaluations, at least 1.
        generator: the source of the noise that is put back, one or one for each row; None for torch's own.
        times: the steps - 1 times to which noise is put back, increasing within (0, 1).

    Raises:
        ValueError: if steps is below 1, or `times` is of another length, not increasing or outside (0, 1).
    """
    check_steps(steps)
    times = [0.7 + 0.3 * k / (steps - 1) for k in range(steps - 1)] if times is None else list(times)
    check_times(times, steps)
    x_hat = flow_map_step(student, x_0, NOISE, DATA, condition)
    for time in times:
        x_hat = flow_map_step(student, renoise(x_hat, time, generator), time, DATA, condition)
    return x_hat


def renoise(x_hat: Sample, time: float, generator: Generators | None) -> Sample:
    """Return (1 - t) noise + t x_hat with fresh noise."""
    if isinstance(generator, Sequence):
        rows = zip(x_hat, generator, strict=True)
        noise = torch.stack([torch.randn(x.shape, generator=g, dtype=x.dtype, device=g.device) for x, g in rows])
    else:
        noise = torch.randn(x_hat.shape, generator=generator, dtype=x_hat.dtype, device=x_hat.device)
    noise = noise.to(x_hat.device)
    return interpolate(noise, x_hat, at(time, x_hat))


def check_times(times: Sequence[float], steps: int) -> None:
    """Refuse times that do not fit `steps`, or do not increase within (0, 1)."""
    bounds = [NOISE, *times, DATA]
    if len(times) != steps - 1 or any(b <= a for a, b in pairwise(bounds)):
        raise ValueError(f"times must be {steps - 1} increasing values between 0 and 1: got {list(times)}")
