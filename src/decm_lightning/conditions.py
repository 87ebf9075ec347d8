"""What can be done to a condition whatever its kind: join several, keep the first rows."""

from collections.abc import Sequence

import torch
from torch import Tensor


def join(conditions: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate conditions along the batch; None (unconditional) stays None.

    Raises:
        ValueError: if some are None and others are not.
    """
    given = [condition for condition in conditions if condition is not None]
    if given and len(given) != len(conditions):
        raise ValueError("conditions must be given for all rows or for none")
    return torch.cat(given) if given else None


def first_rows(condition: Tensor | None, count: int) -> Tensor | None:
    """Return the condition of the first `count` rows."""
    return None if condition is None else condition[:count]
