"""The words that every other module speaks: tensor shapes, a batch, and the two kinds of field.

Shapes are jaxtyping annotations. They cost nothing in use; the test suite checks them at run time.
"""

from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

Sample: TypeAlias = Float[Tensor, "b *d"]
"""Anything a flow moves: points (b, d), images or latents (b, c, h, w)."""

Time: TypeAlias = Float[Tensor, " b"]
"""One time per row, in [0, 1]: 0 is noise, 1 is data."""


class Captions(NamedTuple):
    """Captions as a text encoder gives them.

    Attributes:
        tokens: one vector for each token, (b, n, d).
        mask: true where there is a token, (b, n); None where there is one everywhere.
        pooled: one vector for each caption, (b, p); None if the network reads none.
    """

    tokens: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"] | None = None
    pooled: Float[Tensor, "b p"] | None = None


Labels: TypeAlias = Int[Tensor, " b"] | None
"""Class labels, one per row; None for an unconditional flow."""

Condition: TypeAlias = Labels | Captions
"""What a flow is conditioned on: labels or captions, one per row, or None."""


class Batch(NamedTuple):
    """What a data loader yields: samples at t = 1 and what they are conditioned on."""

    x_1: Sample
    condition: Condition


@runtime_checkable
class VelocityField(Protocol):
    """An instantaneous velocity v(x_t, t), such as a teacher, guided or not."""

    def __call__(self, x_t: Sample, t: Time, condition: Condition) -> Sample:
        """Return v, shaped like x_t."""


@runtime_checkable
class FlowMapNetwork(Protocol):
    """A mean velocity u(x_t, t, s) over the jump from t to s, such as a student."""

    def __call__(self, x_t: Sample, t: Time, s: Time, condition: Condition) -> Sample:
        """Return u, shaped like x_t."""
