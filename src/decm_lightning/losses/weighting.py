"""How a residual is normalized before the student is moved along it, and how its rows are weighted by time.

Every loss moves u toward u - N(g). N decides how hard: it is one function of g, the same for all losses of a step,
because a normalized loss beside a plain one starves one of the two.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from decm_lightning.path import expand
from decm_lightning.types import Sample, Time

Normalization = Callable[[Sample], Sample]


def plain(g: Sample) -> Sample:
    """Return g: the mean square error."""
    return g


def clamp(g: Sample) -> Sample:
    """Return g cut to [-1, 1] in each element (FACM, arXiv 2507.03738)."""
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
TIME_WEIGHTS: dict[TimeWeightName, Callable[[Time], Time]] = {
    "constant": torch.ones_like,
    "cosine": lambda t: torch.cos(torch.pi / 2 * t),
}


def warm_up(step: int, steps: int) -> float:
    """Return the factor on the derivative term: from 0 to 1 over the first `steps` steps; 1 if `steps` is 0."""
    return min(1.0, step / steps) if steps else 1.0


def stopgrad_mse(u: Sample, g: Sample, weight: Time) -> Tensor:
    """Return mean(weight |u - sg(u - g)|^2), whose gradient is 2 g du/dtheta: a scalar.

    The stop-gradient is here, where the target is born; g must carry no graph.
    """
    u_target = (u - g).detach()
    return (expand(weight, u) * (u - u_target).square()).mean()


def cosine_loss(u: Sample, g: Sample) -> Tensor:
    """Return mean(1 - cosine similarity of u and sg(u - g) over the channels, axis 1): a scalar.

    The second half of the paper's flow-matching loss. With one channel the similarity is a sign: no gradient.
    """
    u_target = (u - g).detach()
    return (1 - torch.nn.functional.cosine_similarity(u, u_target, dim=1)).mean()


def _per_row(values: Tensor) -> Tensor:
    return expand(values.flatten(1).mean(1), values)
