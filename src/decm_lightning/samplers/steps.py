"""What the samplers share: times as tensors, checked arguments, and one jump."""

import torch

from decm_lightning.path import jump, time_dtype
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time


def at(time: float, x: Sample) -> Time:
    """Return `time` for every row of x, in float32 or wider."""
    return torch.full((len(x),), time, dtype=time_dtype(x), device=x.device)


def flow_map_step(student: FlowMapNetwork, x_t: Sample, start: float, end: float, condition: Condition) -> Sample:
    """Return f(x_t, t, s): one jump of the student from time `start` to time `end`."""
    t, s = at(start, x_t), at(end, x_t)
    return jump(x_t, student(x_t, t, s, condition), t, s)


def check_steps(steps: int) -> None:
    """Refuse fewer than one step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1: got {steps}")


def check_s1(s1: float) -> None:
    """Refuse a first end time outside (0, 1)."""
    if not 0 < s1 < 1:
        raise ValueError(f"s1 must be between 0 and 1, both excluded: got {s1}")
