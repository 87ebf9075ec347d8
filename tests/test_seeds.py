"""Seeds: their range, and one generator for each sample."""

import pytest
import torch

from decm_lightning.seeds import check_seed, generator_of, seed_of_run


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_a_seed_in_range_is_returned(seed):
    assert check_seed(seed) == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 2**100])
def test_a_seed_out_of_range_is_refused_with_its_value(seed):
    with pytest.raises(ValueError, match=rf"^seed must be from 0 to 2\*\*63 - 1: got {seed}$"):
        check_seed(seed)


def test_a_process_without_a_seed_uses_the_one_of_the_process_that_spawned_it():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        assert seed_of_run(None, 3) == 5
        assert seed_of_run(7, 3) == 7
        torch.default_generator.manual_seed(torch.Generator().initial_seed())
        assert seed_of_run(None, 3) == 3
    with pytest.raises(ValueError, match="got -1"):
        seed_of_run(-1, 3)


def test_all_samples_differ():
    """Large seeds and several numbers also give distinct generators."""
    of_one = [(seed, number) for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**63 - 1) for number in range(20)]
    of_two = [(0, number, image) for number in range(20) for image in range(20)]
    noise = {torch.randn(3, generator=generator_of(*numbers)).numpy().tobytes() for numbers in of_one + of_two}
    assert len(noise) == len(of_one) + len(of_two)
    assert torch.equal(torch.randn(3, generator=generator_of(0, 1)), torch.randn(3, generator=generator_of(0, 1)))
