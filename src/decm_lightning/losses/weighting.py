"""Normalizations N(g) of the residual, weights of rows by their times, and losses that regress u toward u - N(g).

The losses of DE-CM share one N(g): if only one of two losses were normalized, the other would dominate or vanish.
Methods that were published with a different N(g) for each loss set it on the loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
"""Maps the start times t, (b,), or the start and end times t and s, to one weight per row, (b,)."""

TimeWeightName = Literal["constant", "cosine", "one_minus_root"]
TIME_WEIGHTS: dict[TimeWeightName, TimeWeight] = {
    "constant": torch.ones_like,
    "cosine": lambda t: torch.cos(torch.pi / 2 * t),
    "one_minus_root": lambda t: 1 - t.sqrt(),
}


def check_choice(argument: str, choice: Any, table: Mapping[Any, Any]) -> None:
    """Check that a choice is a function or a name in the table.

    Raises:
        ValueError: if it is not; the message lists the names.
    """
    if choice not in table if isinstance(choice, str) else not callable(choice):
        raise ValueError(f"{argument} must be a function or one of {', '.join(table)}: got {choice!r}")


@dataclass(frozen=True)
class Normalize:
    """The normalization N(g) = h / size(h) with h = factor(t) clamp(g, -limit, limit).

    size(h) = (M + constant)^power, or M^power + constant if `outside`, with M = mean(h^2) over the elements of a
    sample. With `over="sum"` the constant is added to the sum of squares: size(h) = (D M + constant)^power / D for D
    elements. power = 0 leaves h as it is.

    | method | arguments |
    |---|---|
    | mean square | none |
    | FACM (arXiv 2507.03738), consistency | limit=1, factor="one_minus_root", power=0.5, constant=1e-3 |
    | sCM (arXiv 2410.11081, section 4.2), tangent normalization | power=0.5, constant=0.1, outside=True |
    | MeanFlow (arXiv 2505.13447, section 4.3), adaptive L2 | power=1, constant=0.01, over="sum" |

    >>> g = torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    >>> Normalize(limit=1.0)(g, torch.zeros(1))
    tensor([[1., 1., 0., 0.]])
    >>> Normalize(power=0.5, constant=0.5, outside=True)(g, torch.zeros(1))
    tensor([[1.0000, 1.3333, 0.0000, 0.0000]])

    Args:
        limit: bound on each element of g, above 0; None for no bound.
        factor: factor of each row by its start time, "constant", "cosine", "one_minus_root" (1 - t^0.5) or a function,
            applied before the division.
        power: exponent, at least 0.
        constant: added constant, at least 0.
        outside: add the constant to the power, not inside it.
        over: "mean" or "sum" of the squares to which the constant is added.

    Raises:
        ValueError: if a value is out of its range or unknown, or the constant is added outside to a sum.
    """

    limit: float | None = None
    factor: TimeWeightName | TimeWeight = "constant"
    power: float = 0.0
    constant: float = 0.0
    outside: bool = False
    over: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"limit must be above 0: got {self.limit}")
        if self.power < 0 or self.constant < 0:
            raise ValueError(f"power and constant must be at least 0: got {self.power}, {self.constant}")
        if self.over not in ("mean", "sum") or (self.over == "sum" and self.outside):
            raise ValueError(f"over must be 'mean', or 'sum' with outside=False: got {self.over!r}")
        check_choice("factor", self.factor, TIME_WEIGHTS)

    def __call__(self, g: Sample, t: Time) -> Sample:
        """Return N(g), shaped like g."""
        h = g if self.limit is None else g.clamp(-self.limit, self.limit)
        if self.factor != "constant":
            h = expand(time_weights(t, t, self.factor), h) * h
        if not self.power:
            return h
        mean = expand(h.square().flatten(1).mean(1), h)
        if self.outside:
            return h / (mean**self.power + self.constant)
        if self.over == "sum":
            elements = h[0].numel()
            return elements * h / (elements * mean + self.constant) ** self.power
        return h / (mean + self.constant) ** self.power


NormalizationName = Literal["plain", "clamp", "tangent_norm", "adaptive_l2"]
NORMALIZATIONS: dict[NormalizationName, Normalization] = {
    "plain": Normalize(),
    "clamp": Normalize(limit=1.0),
    "tangent_norm": Normalize(power=0.5, constant=0.1, outside=True),
    "adaptive_l2": Normalize(power=0.5, constant=1e-3),
}
"""g itself; elements clamped to [-1, 1]; g / (rms(g) + 0.1); g / (mean(g^2) + 1e-3)^0.5."""


def normalized(g: Sample, t: Time, by: NormalizationName | Normalization) -> Sample:
    """Return N(g), or N(g, t) if the function requires a second argument.

    Args:
        g: the residual, (b, *d).
        t: start times, (b,).
        by: the name of a normalization, or a function.
    """
    function: Normalization = NORMALIZATIONS[by] if isinstance(by, str) else by
    return function(g, t) if _required_arguments(function) > 1 else function(g)


def time_weights(t: Time, s: Time, by: TimeWeightName | TimeWeight) -> Time:
    """Return the weight of each row by its times; `by` is a name, or a function of t or of t and s."""
    function: TimeWeight = TIME_WEIGHTS[by] if isinstance(by, str) else by
    # torch's own functions have no signature, and take one argument.
    return function(t, s) if _required_arguments(function) > 1 else function(t)


def _required_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = signature(function).parameters.values()
    except ValueError:
        return 1
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is Parameter.empty for p in parameters)


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
