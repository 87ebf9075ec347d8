"""Operations on conditions of every kind: labels, captions, or None."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

from decm_lightning.types import Captions

# Not types.Condition: jaxtyping would require the same number of rows in arguments and result.
Condition: TypeAlias = Tensor | Captions | None


def select(condition: Condition, rows: Tensor | slice) -> Condition:
    """Return the selected rows of a condition; None stays None."""
    return _pytree.tree_map_only(Tensor, lambda part: part[rows], condition)


def join(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions along the batch; None (unconditional) stays None.

    Raises:
        ValueError: if some conditions are None and others are not, or only some have a mask or pooled vectors.
    """
    return _merge(torch.cat, *conditions)


def where(rows: Tensor, first: Condition, second: Condition) -> Condition:
    """Return the first condition where rows, (b,), is true, and the second elsewhere.

    Raises:
        ValueError: if only one condition is None, or only one has a mask or pooled vectors.
    """

    def merge(parts: Sequence[Tensor]) -> Tensor:
        return torch.where(rows.reshape(-1, *(1,) * (parts[0].ndim - 1)), parts[0], parts[1])

    return _merge(merge, first, second)


def _merge(function: Callable[[Any], Tensor], *conditions: Condition) -> Condition:
    if len({condition is None for condition in conditions}) > 1:
        raise ValueError("conditions must be passed for all rows or for none: some are None and others are not")

    def merge(*parts: Any) -> Tensor | None:
        if len({part is None for part in parts}) > 1:
            raise ValueError("mask and pooled vectors of captions must be passed for all rows or for none")
        return None if parts[0] is None else function(parts)

    return _pytree.tree_map(merge, *conditions)
