"""Check seeds, and create the random generator of a sample."""

import torch
from numpy.random import SeedSequence

END = 2**63


def check_seed(seed: int) -> int:
    """Return a seed if it is valid.

    Raises:
        ValueError: if it is negative, or 2**63 or more.
    """
    if not 0 <= seed < END:
        raise ValueError(f"seed must be from 0 to 2**63 - 1: got {seed}")
    return seed


def seed_of_run(requested: int | None, earlier: int) -> int:
    """Return the seed of a run that starts now.

    Args:
        requested: the seed that the user chose; None for the one of `L.seed_everything` or `torch.manual_seed`.
        earlier: the seed to use if this process set none, as in processes that a strategy spawns.

    Raises:
        ValueError: if the requested seed is outside [0, 2^63).
    """
    if requested is not None:
        return check_seed(requested)
    seed = torch.initial_seed()
    return earlier if seed == torch.Generator().initial_seed() else seed


def generator_of(seed: int, *numbers: int) -> torch.Generator:
    """Return the generator of a sample, for all of its noise. It depends only on the seed and the sample's numbers.

    It is on the CPU, so that the noise is the same on every device.

    Example:
        >>> torch.equal(torch.rand(2, generator=generator_of(0, 7)), torch.rand(2, generator=generator_of(0, 7)))
        True
    """
    # As one sequence, seed 2**32 with number 0 would equal seed 0 with number 1.
    return torch.Generator().manual_seed(int(SeedSequence(seed, spawn_key=numbers).generate_state(1)[0]))


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """Return the generator if it is on the CPU, otherwise a CPU generator with its seed."""
    return generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())
