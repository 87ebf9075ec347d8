"""Tangents that are shorter than their values: they are zero beyond their end, and every rule may rely on that."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TangentRows:
    """The one axis on which a tangent is shorter than its value.

    Attributes:
        axis: the axis, counted from the right and so negative: where broadcasting aligns shapes.
        count: the tangent's size on that axis.
        total: the value's size on that axis.
    """

    axis: int
    count: int
    total: int

    @classmethod
    def between(cls, whole: Tensor, part: Tensor) -> "TangentRows | None":
        """Return where a tangent is shorter than its value; None if nowhere."""
        if whole.shape == part.shape:
            return None
        assert whole.ndim == part.ndim, (whole.shape, part.shape)
        differs = [i for i in range(-whole.ndim, 0) if whole.shape[i] != part.shape[i]]
        assert len(differs) == 1, (whole.shape, part.shape)
        return cls(differs[0], part.shape[differs[0]], whole.shape[differs[0]])

    def of(self, whole: Tensor) -> Tensor:
        """Return what of a tensor belongs to the tangent's rows: all of it, if it is broadcast along the axis."""
        if whole.ndim < -self.axis or whole.shape[self.axis] != self.total:
            return whole
        return whole.narrow(self.axis, 0, self.count)

    def after_reshape(self, before: Sequence[int], after: Sequence[int]) -> list[int] | None:
        """Return the tangent's shape when its value goes from shape `before` to `after`; None if it has none.

        The rows stay the first ones of an axis if as many elements stand before that axis as stood before the old one.
        """
        outside = math.prod(before[: self.axis])
        for i, size in enumerate(after):
            if size > 1 and math.prod(after[:i]) == outside:
                rows, rest = divmod(size * self.count, self.total)
                return None if rest else [*after[:i], rows, *after[i + 1 :]]
        return None


def pad(part: Tensor, whole: Tensor) -> Tensor:
    """Return the tangent `part` in the shape of its value `whole`, with the zeros written out."""
    rows = TangentRows.between(whole, part)
    if rows is None:
        return part
    shape = list(part.shape)
    shape[rows.axis] = rows.total - rows.count
    return torch.cat([part, part.new_zeros(shape)], rows.axis)
