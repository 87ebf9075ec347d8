"""The convention: t = 0 is noise, t = 1 is data, and the path between them is straight.

This is the one file that knows which end is noise. Foreign conventions are converted in ``teachers``.
Symbols, here and everywhere: ``t`` start time, ``s`` end time, ``x_0`` noise, ``x_1`` data, ``x_t`` a point on
the way, ``v`` instantaneous velocity, ``u`` mean velocity from t to s (the paper's F).

Times are float32 or wider, whatever the dtype of the samples: bfloat16 has steps of 0.004 below t = 1. A point of the
path has the dtype of the sample that it was computed from, and is rounded once.
"""

import torch
from torch import Tensor

from decm_lightning.types import Sample, Time

NOISE = 0.0
DATA = 1.0


def time_dtype(x: Sample) -> torch.dtype:
    """Return the dtype of times for samples x: theirs, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def expand(time: Time, x: Sample) -> Tensor:
    """Give times of shape (b,) the trailing axes of x, and its device, so that the two broadcast."""
    return time.to(x.device, non_blocking=True).reshape(-1, *(1,) * (x.ndim - 1))


def interpolate(x_0: Sample, x_1: Sample, t: Time) -> Sample:
    """Return x_t = (1 - t) x_0 + t x_1 in the dtype of x_0 (DE-CM, arXiv 2602.10764, section 2)."""
    t = expand(t, x_0)
    return ((1 - t) * x_0 + t * x_1).to(x_0.dtype)


def velocity(x_0: Sample, x_1: Sample) -> Sample:
    """Return the conditional velocity d x_t / dt = x_1 - x_0, the target of flow matching."""
    return x_1 - x_0


def jump(x_t: Sample, u: Sample, t: Time, s: Time) -> Sample:
    """Return the end point f(x_t, t, s) = x_t + (s - t) u of a jump with mean velocity u, in the dtype of x_t."""
    return (x_t + expand(s - t, x_t) * u).to(x_t.dtype)
