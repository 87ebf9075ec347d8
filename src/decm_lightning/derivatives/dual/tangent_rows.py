"""Tangents that cover only the first rows of their values; beyond these rows they are zero."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TangentRows:
    """The one axis on which a tangent is shorter than its value.

    Attributes:
        axis: the axis, counted from the right as in broadcasting, so negative.
        count: the tangent's size on that axis.
        total: the value's size on that axis.
    """

    axis: int
    count: int
    total: int

    @classmethod
    def between(cls, whole: Tensor, part: Tensor) -> "TangentRows | None":
        """Return the axis on which a tangent is shorter than its value; None if their shapes are equal."""
        if whole.shape == part.shape:
            return None
        assert whole.ndim == part.ndim, (whole.shape, part.shape)
        differs = [i for i in range(-whole.ndim, 0) if whole.shape[i] != part.shape[i]]
        assert len(differs) == 1, (whole.shape, part.shape)
        return cls(differs[0], part.shape[differs[0]], whole.shape[differs[0]])

    def of(self, whole: Tensor) -> Tensor:
        """Return the tangent's rows of a tensor; all of it if it broadcasts along the axis."""
        if whole.ndim < -self.axis or whole.shape[self.axis] != self.total:
            return whole
        return whole.narrow(self.axis, 0, self.count)

    def after_reshape(self, before: Sequence[int], after: Sequence[int]) -> list[int] | None:
        """Return the tangent's shape after its value is reshaped from `before` to `after`; None if rows get mixed.

        The rows stay the first rows of an axis if the product of the sizes before that axis is unchanged.
        """
        outside = math.prod(before[: self.axis])
        for i, size in enumerate(after):
            if size > 1 and math.prod(after[:i]) == outside:
                rows, rest = divmod(size * self.count, self.total)
                return None if rest else [*after[:i], rows, *after[i + 1 :]]
        return None


def pad(part: Tensor, whole: Tensor) -> Tensor:
    """Return the tangent `part` padded with zeros to the shape of its value `whole`."""
    rows = TangentRows.between(whole, part)
    if rows is None:
        return part
    shape = list(part.shape)
    shape[rows.axis] = rows.total - rows.count
    return torch.cat([part, part.new_zeros(shape)], rows.axis)
