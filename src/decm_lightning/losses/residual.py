"""The dual-end residual: the one equation that every loss of this family is a case of."""

import torch

from decm_lightning.derivatives.forward import Tangent
from decm_lightning.path import expand
from decm_lightning.types import Sample, Time


def tangent(v_start: Sample | None, t: Time, start_weight: float, end_weight: float) -> Tangent:
    """Return the tangent (gamma v_start, gamma, -lambda) over (x, t, s) along which the residual differentiates u.

    A public summary of the paper prints (lambda v, lambda, -gamma). That contradicts the residual below: with it the
    residual of the exact flow map is not 0, except where gamma = lambda.

    Args:
        v_start: the teacher's velocity at (x_t, t), (b, *d); None if start_weight = 0: nothing moves in x.
        t: start times, (b,).
        start_weight: gamma, at least 0.
        end_weight: lambda, at least 0.

    Raises:
        ValueError: if v_start is None and start_weight is not 0.
    """
    if start_weight and v_start is None:
        raise ValueError(f"the tangent needs the velocity at the start: got None with start_weight = {start_weight}")
    x = start_weight * v_start if start_weight and v_start is not None else None
    return Tangent(x, torch.full_like(t, start_weight), torch.full_like(t, -end_weight))


def residual(
    u: Sample,
    jvp: Sample | None,
    v_start: Sample | None,
    v_end: Sample | None,
    t: Time,
    s: Time,
    start_weight: float,
    end_weight: float,
    warmup: float = 1.0,
) -> Sample:
    """Return g, which is 0 everywhere exactly when u is the flow map's mean velocity.

        g = (lambda + gamma) u - gamma v_start - lambda v_end - warmup (s - t) jvp

    The identity at the start of a step is u = v(x_t, t) + (s - t) (du/dx v + du/dt), the one at its end is
    u + (s - t) du/ds = v(f(x_t, t, s), s); g is their sum, weighted by gamma and lambda (DE-CM, arXiv 2602.10764).
    (gamma, lambda) = (1, 0) is MeanFlow's and consistency training's equation, (0, 1) Lagrangian distillation's, and
    (1, 0) at s = t flow matching's.

    Args:
        u: the student's mean velocity, detached, (b, *d).
        jvp: its derivative along `tangent(...)`; None where s = t, since it is then multiplied by 0.
        v_start: the teacher's velocity at (x_t, t); None if start_weight = 0.
        v_end: the teacher's velocity at the end point and time; None if end_weight = 0.
        t: start times, (b,).
        s: end times, (b,).
        start_weight: gamma, weight of the start identity, at least 0.
        end_weight: lambda, weight of the end identity, at least 0.
        warmup: factor in [0, 1] on the derivative term (sCM, arXiv 2410.11081, section 4.2).
    """
    g = (start_weight + end_weight) * u
    if v_start is not None:
        g = g - start_weight * v_start
    if v_end is not None:
        g = g - end_weight * v_end
    if jvp is not None:
        g = g - warmup * expand(s - t, u) * jvp
    return g
