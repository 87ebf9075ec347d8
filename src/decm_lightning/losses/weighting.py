"""Normalizations N(g) of the residual, weights of rows by start time, and losses that regress u toward u - N(g).

All losses of a step share one N(g). If only one of two losses were normalized, the other would dominate or vanish.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, Literal

import torch
from torch import Tensor

from decm_lightning.path import expand
from decm_lightning.types import Sample, Time

# Any instead of Tensor: with Tensor the config parser would require annotations of functions.
Normalization = Callable[..., Any]
"""N(g), or N(g, t) with the start times t, (b,), which may be on the CPU: `path.expand(t, g)` moves them."""
TimeWeight = Callable[..., Any]
"""Maps the start times t, (b,), to one weight per row, (b,)."""


def plain(g: Sample) -> Sample:
    """Return g, which gives the mean squared error."""
    return g


def clamp(g: Sample) -> Sample:
    """Return g with each element clamped to [-1, 1] (FACM, arXiv 2507.03738)."""
    return g.clamp(-1, 1)


def tangent_norm(g: Sample) -> Sample:
    """Return g / (rms(g) + 0.1), with rms over all elements of a sample (sCM, arXiv 2410.11081, eq. 10)."""
    return g / (_per_row(g.square()).sqrt() + 0.1)


def adaptive_l2(g: Sample) -> Sample:
    """Return g / (mean(g^2) + 1e-3)^0.5: normalized L2 (MeanFlow, arXiv 2505.13447, section 4.3; FACM)."""
    return g / (_per_row(g.square()) + 1e-3).sqrt()


NormalizationName = Literal["plain", "clamp", "tangent_norm", "adaptive_l2"]
NORMALIZATIONS: dict[NormalizationName, Normalization] = {
    "plain": plain,
    "clamp": clamp,
    "tangent_norm": tangent_norm,
    "adaptive_l2": adaptive_l2,
}

TimeWeightName = Literal["constant", "cosine"]
TIME_WEIGHTS: dict[TimeWeightName, TimeWeight] = {
    "constant": torch.ones_like,
    "cosine": lambda t: torch.cos(torch.pi / 2 * t),
}


def check_choice(argument: str, choice: Any, table: Mapping[Any, Any]) -> None:
    """Check that a choice is a function or a name in the table.

    Raises:
        ValueError: if it is not; the message lists the names.
    """
    if choice not in table if isinstance(choice, str) else not callable(choice):
        raise ValueError(f"{argument} must be a function or one of {', '.join(table)}: got {choice!r}")


def normalized(g: Sample, t: Time, by: NormalizationName | Normalization) -> Sample:
    """Return N(g), or N(g, t) if the function requires a second argument.

    Args:
        g: the residual, (b, *d).
        t: start times, (b,).
        by: the name of a normalization, or a function.
    """
    function: Normalization = NORMALIZATIONS[by] if isinstance(by, str) else by
    required = [
        parameter
        for parameter in signature(function).parameters.values()
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is Parameter.empty
    ]
    return function(g, t) if len(required) > 1 else function(g)


def time_weights(t: Time, by: TimeWeightName | TimeWeight) -> Time:
    """Return the weight of each row at its start time; `by` is the name of a weight or a function."""
    return (TIME_WEIGHTS[by] if isinstance(by, str) else by)(t)


def warm_up(step: int, steps: int) -> float:
    """Return the factor of the derivative term, which rises from 0 to 1 over `steps` steps; 1 if `steps` is 0."""
    return min(1.0, step / steps) if steps else 1.0


def stopgrad_mse(u: Sample, g: Sample, weight: Time) -> Tensor:
    """Return mean(weight |u - sg(u - g)|^2), whose gradient is 2 g du/dtheta: a scalar.

    The stop-gradient is applied here, where the target is computed; g must not have a graph.
    """
    u_target = (u - g).detach()
    return (expand(weight, u) * (u - u_target).square()).mean()


def cosine_loss(u: Sample, g: Sample) -> Tensor:
    """Return mean(1 - cosine similarity of u and sg(u - g) over the channels, axis 1): a scalar.

    This is the second term of the paper's flow-matching loss. With one channel the similarity is a sign and has no
    gradient.
    """
    u_target = (u - g).detach()
    return (1 - torch.nn.functional.cosine_similarity(u, u_target, dim=1)).mean()


def _per_row(values: Tensor) -> Tensor:
    return expand(values.flatten(1).mean(1), values)
