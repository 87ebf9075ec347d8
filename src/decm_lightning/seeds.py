"""Seeds: which ones are valid, and one generator for each sample."""

import torch
from numpy.random import SeedSequence

END = 2**63


def check_seed(seed: int) -> int:
    """Return a seed.

    Raises:
        ValueError: if it is negative, or 2**63 or more.
    """
    if not 0 <= seed < END:
        raise ValueError(f"seed must be from 0 to 2**63 - 1: got {seed}")
    return seed


def generator_of(seed: int, *numbers: int) -> torch.Generator:
    """Return the generator of one sample: all of its noise depends on the seed and the sample's numbers alone.

    It is on the CPU, so that the noise is the same on every device.
    """
    # As one sequence, seed 2**32 and number 0 would be the same words as seed 0 and number 1.
    return torch.Generator().manual_seed(int(SeedSequence(seed, spawn_key=numbers).generate_state(1)[0]))
