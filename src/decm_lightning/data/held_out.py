"""Choose the images that are held out from training, by a hash."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor


def is_held_out(names: Sequence[str], fraction: float) -> Bool[Tensor, " n"]:
    """Return which names are held out. The choice depends only on a hash of each name."""
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in names]
    return torch.tensor([value < fraction for value in hashes], dtype=torch.bool)
