"""The straight path from noise at t = 0 to data at t = 1.

Only this file defines which end is noise. ``teachers`` converts other conventions.
Symbols used throughout: ``t`` start time, ``s`` end time, ``x_0`` noise, ``x_1`` data, ``x_t`` a point on the path,
``v`` instantaneous velocity, ``u`` mean velocity from t to s (the paper's F).

Times are always float32 or wider, because bfloat16 has a resolution of only 0.004 just below t = 1. Points on the path
have the dtype of the samples that they are computed from, and are rounded once.
"""

import torch
from torch import Tensor

from decm_lightning.types import Sample, Time

NOISE = 0.0
DATA = 1.0


def time_dtype(x: Sample) -> torch.dtype:
    """Return the dtype of times for samples x: the dtype of x, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def expand(time: Time, x: Sample) -> Tensor:
    """Reshape times (b,) to (b, 1, ..., 1) and move them to the device of x, so that they broadcast with x."""
    return time.to(x.device, non_blocking=True).reshape(-1, *(1,) * (x.ndim - 1))


def interpolate(x_0: Sample, x_1: Sample, t: Time) -> Sample:
    """Return x_t = (1 - t) x_0 + t x_1 in the dtype of x_0 (DE-CM, arXiv 2602.10764, section 2).

    >>> interpolate(torch.zeros(3, 1), torch.ones(3, 1), torch.tensor([0.0, 0.25, 1.0])).flatten()
    tensor([0.0000, 0.2500, 1.0000])
    """
    t = expand(t, x_0)
    return ((1 - t) * x_0 + t * x_1).to(x_0.dtype)


def velocity(x_0: Sample, x_1: Sample) -> Sample:
    """Return the conditional velocity d x_t / dt = x_1 - x_0, the target of flow matching."""
    return x_1 - x_0


def jump(x_t: Sample, u: Sample, t: Time, s: Time) -> Sample:
    """Return the end point f(x_t, t, s) = x_t + (s - t) u of a jump with mean velocity u, in the dtype of x_t."""
    return (x_t + expand(s - t, x_t) * u).to(x_t.dtype)
