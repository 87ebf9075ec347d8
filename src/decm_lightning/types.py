"""Shared types: tensor shapes, conditions, batches, and the two kinds of network.

Shapes are jaxtyping annotations. The test suite checks them at run time; otherwise they have no cost.
"""

from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Sample: TypeAlias = Float[Tensor, "b *d"]
"""Samples of a flow: points (b, d), images or latents (b, c, h, w)."""

Time: TypeAlias = Float[Tensor, " b"]
"""One time per row, in [0, 1]: 0 is noise, 1 is data."""


class Captions(NamedTuple):
    """Encoded captions, as a text encoder returns them.

    Attributes:
        tokens: one vector per token, (b, n, d).
        mask: true for tokens and false for padding, (b, n); None if nothing is padded.
        pooled: one vector per caption, (b, p); None if the network does not use it.
    """

    tokens: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"] | None = None
    pooled: Float[Tensor, "b p"] | None = None


Labels: TypeAlias = Int[Tensor, " b"] | None
"""Class labels, one per row; None for an unconditional flow."""

Condition: TypeAlias = Labels | Captions
"""The condition of a flow: labels or captions, one per row, or None."""


class Batch(NamedTuple):
    """A batch from a data loader: data x_1 (samples at t = 1) and their conditions."""

    x_1: Sample
    condition: Condition


@runtime_checkable
class VelocityField(Protocol):
    """An instantaneous velocity v(x_t, t), such as a teacher with or without guidance."""

    def __call__(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v, shaped like x_t."""


@runtime_checkable
class FlowMapNetwork(Protocol):
    """A mean velocity u(x_t, t, s) over the step from t to s, such as a student."""

    def __call__(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return u, shaped like x_t."""
