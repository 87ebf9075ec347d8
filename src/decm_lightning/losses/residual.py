"""The dual-end residual, of which every loss of this family is a special case."""

import torch

from decm_lightning.derivatives.forward import Tangent
from decm_lightning.path import expand
from decm_lightning.types import Sample, Time


def tangent(v_start: Sample | None, t: Time, start_weight: float, end_weight: float) -> Tangent:
    """Return the tangent (gamma v_start, gamma, -lambda) over (x, t, s) along which the residual differentiates u.

    A public summary of the paper prints (lambda v, lambda, -gamma). With that tangent the residual of the exact flow
    map is not 0 unless gamma = lambda.

    >>> tangent(torch.ones(1, 2), torch.tensor([0.5]), start_weight=1.0, end_weight=0.5)
    Tangent(x=tensor([[1., 1.]]), t=tensor([1.]), s=tensor([-0.5000]))

    Args:
        v_start: the teacher's velocity at (x_t, t), (b, *d); None if start_weight = 0, where the tangent has no x.
        t: start times, (b,).
        start_weight: gamma, at least 0.
        end_weight: lambda, at least 0.

    Raises:
        ValueError: if v_start is None and start_weight is not 0.
    """
    if start_weight and v_start is None:
        raise ValueError(f"the tangent needs the velocity at the start: got None and start_weight = {start_weight}")
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
    """Return g, which is 0 everywhere if and only if u is the mean velocity of the flow map.

        g = (lambda + gamma) u - gamma v_start - lambda v_end - warmup (s - t) jvp

    The start identity is u = v(x_t, t) + (s - t) (du/dx v + du/dt). The end identity is
    u + (s - t) du/ds = v(f(x_t, t, s), s). g is the sum of both, weighted by gamma and lambda (DE-CM, arXiv
    2602.10764). (gamma, lambda) = (1, 0) gives MeanFlow and consistency training, (0, 1) Lagrangian distillation, and
    (1, 0) at s = t flow matching.

    For the exact flow of a Gaussian the residual is 0:

    >>> from decm_lightning.derivatives import functional
    >>> from decm_lightning.flows import Gaussian
    >>> flow, x_t = Gaussian(mean=1.0, std=0.5), torch.tensor([[0.3], [-1.2]])
    >>> t, s = torch.tensor([0.1, 0.4]), torch.tensor([0.6, 1.0])
    >>> v_start = flow.velocity(x_t, t)
    >>> v_end = flow.velocity(flow.flow_map(x_t, t, s), s)
    >>> result = functional(flow, x_t, t, s, None, tangent(v_start, t, 1.0, 0.5))
    >>> g = residual(result.u, result.jvp, v_start, v_end, t, s, 1.0, 0.5)
    >>> bool(g.abs().max() < 1e-5)
    True

    Args:
        u: the student's mean velocity, detached, (b, *d).
        jvp: the derivative of u along `tangent(...)`; None if s = t, where it would be multiplied by 0.
        v_start: the teacher's velocity at (x_t, t); None if start_weight = 0.
        v_end: the teacher's velocity at the end point and time; None if end_weight = 0.
        t: start times, (b,).
        s: end times, (b,).
        start_weight: gamma, weight of the start identity, at least 0.
        end_weight: lambda, weight of the end identity, at least 0.
        warmup: factor of the derivative term, in [0, 1] (sCM, arXiv 2410.11081, section 4.2).
    """
    g = (start_weight + end_weight) * u
    if v_start is not None:
        g = g - start_weight * v_start
    if v_end is not None:
        g = g - end_weight * v_end
    if jvp is not None:
        g = g - warmup * expand(s - t, u) * jvp
    return g
