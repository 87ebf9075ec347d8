"""Noise that samplers put back, from one generator for each row."""

import pytest
import torch

from decm_lightning.samplers import sampler
from decm_lightning.seeds import generator_of


@pytest.mark.parametrize("name", ["consistency", "mix_renoised"])
def test_a_row_depends_on_its_own_generator_alone(name, flow):
    """Not on the rows that are sampled with it."""
    x_0 = torch.randn(5, 3, dtype=torch.float64)

    def samples(rows):
        generators = [generator_of(0, row) for row in rows]
        return sampler(name, generators)(flow, x_0[rows], None, 4)

    together = samples(range(5))
    assert torch.equal(samples([3, 1]), together[[3, 1]])
    assert not torch.equal(sampler(name, generator_of(0, 0))(flow, x_0, None, 4), together)


def test_one_generator_too_few_is_refused(flow):
    with pytest.raises(ValueError, match="shorter"):
        sampler("consistency", [generator_of(0, 0)])(flow, torch.randn(2, 3), None, 2)
