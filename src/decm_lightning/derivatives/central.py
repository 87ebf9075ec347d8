"""Derivative by central differences, for networks that do not support forward-mode differentiation."""

import torch

from decm_lightning.conditions import select
from decm_lightning.derivatives.forward import JVPResult, Tangent
from decm_lightning.types import Condition, FlowMapNetwork, Sample, Time

STEP = 5e-3
"""Step size for a network that is smooth in t over [0, 1]."""


def central(
    network: FlowMapNetwork,
    x_t: Sample,
    t: Time,
    s: Time,
    condition: Condition,
    tangent: Tangent | None,
    h: float = STEP,
) -> JVPResult:
    """Return u with its graph, and jvp = (u(p + h d) - u(p - h d)) / 2h from two more passes without a graph.

    Here p = (x, t, s) and d is the tangent. The error is O(h^2) from truncation plus rounding / h: in float32 about
    2e-4 at the default h for a network smooth in t over [0, 1]. A network that embeds 1000 t needs h <= 1e-4
    (`step_for`). bfloat16 is refused, because there the rounding error alone is 50 % or more.

    Args:
        network: the student.
        x_t: start points, (b, *d).
        t: start times, (b,).
        s: end times, (b,).
        condition: class labels, (b,), or None.
        tangent: tangent over (x, t, s) of the first rows; None to skip the derivative.
        h: step size, above 0, in units of time.

    Raises:
        ValueError: if the network computes in a dtype narrower than float32.
    """
    u = network(x_t, t, s, condition)
    if tangent is None:
        return JVPResult(u, None)
    # Under autocast a network may return float32 after computing in bfloat16.
    narrow = torch.get_autocast_dtype(x_t.device.type) if torch.is_autocast_enabled(x_t.device.type) else u.dtype
    if torch.finfo(narrow).bits < 32:
        raise ValueError(f"derivative central needs float32 or wider: the network computes in {narrow}")
    rows = len(tangent.t)
    known = select(condition, slice(rows))

    def at(step: float) -> Sample:
        x = x_t[:rows] if tangent.x is None else x_t[:rows] + step * tangent.x
        return network(x, t[:rows] + step * tangent.t, s[:rows] + step * tangent.s, known)

    with torch.no_grad():
        return JVPResult(u, (at(h) - at(-h)) / (2 * h))


def step_for(time_scale: float) -> float:
    """Return the step size for a network that embeds time_scale * t: h * time_scale is at most 0.1."""
    return min(STEP, 0.1 / time_scale)
