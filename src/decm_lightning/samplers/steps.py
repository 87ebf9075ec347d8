"""Shared parts of the samplers: times as tensors, checks of schedules, and one step of the flow map."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from decm_lightning.path import DATA, NOISE, jump, time_dtype
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time


def at(time: float, x: Sample) -> Time:
    """Return `time` for every row of x, in float32 or wider."""
    return torch.full((len(x),), time, dtype=time_dtype(x), device=x.device)


def flow_map_step(student: FlowMapNetwork, x_t: Sample, start: float, end: float, condition: Condition) -> Sample:
    """Return f(x_t, t, s): one jump of the student from time `start` to time `end`."""
    t, s = at(start, x_t), at(end, x_t)
    return jump(x_t, student(x_t, t, s, condition), t, s)


def euler_steps(student: FlowMapNetwork, x_t: Sample, times: Sequence[float], condition: Condition) -> Sample:
    """Integrate x <- x + (t' - t) u(x, t, t) from x_t at the first of `times`; return x at the last."""
    for start, end in pairwise(times):
        t = at(start, x_t)
        x_t = jump(x_t, student(x_t, t, t, condition), t, at(end, x_t))
    return x_t


def shifted(time: float, shift: float) -> float:
    """Return t' = t / (shift - (shift - 1) t), which moves steps toward the noise if shift > 1.

    With sigma = 1 - t this is sigma' = shift sigma / (1 + (shift - 1) sigma) (SD3, arXiv 2403.03206, eq. 23; diffusers'
    FlowMatchEulerDiscreteScheduler). LightningDiT applies this formula to t instead of sigma, so its time shift of
    0.3 is a shift of 1 / 0.3 here. The inverse is `shifted` with 1 / shift.
    """
    return time / (shift - (shift - 1) * time)


def check_steps(steps: int) -> None:
    """Raise ValueError if there is not at least one step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1: got {steps}")


def check_shift(shift: float) -> None:
    """Raise ValueError if shift is not above 0 and finite."""
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be above 0 and finite: got {shift}")


def check_times(times: Sequence[float], steps: int, **defaults: bool) -> list[float]:
    """Return the times passed to a sampler, as a list.

    Args:
        times: the steps - 1 times between steps.
        steps: network evaluations.
        defaults: for each option that only changes the default times, whether it has its default value.

    Raises:
        ValueError: if there are not steps - 1 times, they do not increase in (0, 1), or an option was passed too.
    """
    times = list(times)
    if len(times) != steps - 1 or any(b <= a for a, b in pairwise([NOISE, *times, DATA])):
        raise ValueError(f"times must be {steps - 1} increasing values between 0 and 1: got {times}")
    for name, is_default in defaults.items():
        if not is_default:
            raise ValueError(f"pass times or {name}, not both: {name} only changes the default times")
    return times
