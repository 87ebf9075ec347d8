"""What can be done to a condition whatever its kind: join several, keep the first rows."""

from collections.abc import Sequence

import torch

from decm_lightning.types import Condition


def join(conditions: Sequence[Condition]) -> Condition:
    """Concatenate conditions along the batch; None (unconditional) stays None.

    Raises:
        ValueError: if some are None and others are not.
    """
    given = [condition for condition in conditions if condition is not None]
    if given and len(given) != len(conditions):
        raise ValueError("conditions must be given for all rows or for none")
    return torch.cat(given) if given else None


def first_rows(condition: Condition, count: int) -> Condition:
    """Return the condition of the first `count` rows."""
    return None if condition is None else condition[:count]
