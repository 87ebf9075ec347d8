"""The dual-end residual: the one equation that every loss of this family is a case of."""

import torch

from decm_lightning.derivatives.jet import Tangent
from decm_lightning.path import expand
from decm_lightning.types import Sample, Time


def tangent(v_left: Sample | None, t: Time, left: float, right: float) -> Tangent:
    """Return the direction (left v_left, left, -right) over (x, t, s) in which the residual differentiates u.

    With left = 0 nothing moves at the start of the jump: the tangent's x is None, and v_left may be.

    A public summary of the paper prints (right v, right, -left). That contradicts the residual below: with it the
    residual of the exact flow map is not 0, except where left = right.

    Raises:
        ValueError: if v_left is None and left is not 0.
    """
    if left and v_left is None:
        raise ValueError(f"the tangent needs the velocity at the start where its weight is not 0: got left = {left}")
    x = left * v_left if left and v_left is not None else None
    return Tangent(x, torch.full_like(t, left), torch.full_like(t, -right))


def residual(
    u: Sample,
    du: Sample | None,
    v_left: Sample | None,
    v_right: Sample | None,
    t: Time,
    s: Time,
    left: float,
    right: float,
    warmup: float = 1.0,
) -> Sample:
    """Return g, which is 0 everywhere exactly when u is the flow map's mean velocity.

        g = (left + right) u - left v_left - right v_right - warmup (s - t) du

    The identity at the start of a jump is u = v(x_t, t) + (s - t) (du/dx v + du/dt), the one at its landing is
    u + (s - t) du/ds = v(f(x_t, t, s), s); g is their sum, weighted by `left` and `right` (DE-CM, arXiv 2602.10764,
    where they are gamma and lambda). (1, 0) is MeanFlow's and consistency training's equation, (0, 1) Lagrangian
    distillation's, (1, 0) at s = t flow matching's.

    Args:
        u: the student's mean velocity, detached, (b, *d).
        du: its derivative along `tangent(...)`; None where s = t, since it is then multiplied by 0.
        v_left: the teacher's velocity at (x_t, t); None if left = 0.
        v_right: the teacher's velocity at the landing point and time; None if right = 0.
        t: start times, (b,).
        s: landing times, (b,).
        left: weight of the start identity, at least 0.
        right: weight of the landing identity, at least 0.
        warmup: factor in [0, 1] on the derivative term (sCM, arXiv 2410.11081, section 4.2).
    """
    g = (left + right) * u
    if v_left is not None:
        g = g - left * v_left
    if v_right is not None:
        g = g - right * v_right
    if du is not None:
        g = g - warmup * expand(s - t, u) * du
    return g
