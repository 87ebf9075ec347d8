"""Noise that samplers add, from one generator per row."""

import pytest
import torch

from decm_lightning.samplers import consistency
from decm_lightning.seeds import generator_of


def test_a_row_depends_on_its_own_generator_alone(flow):
    """And not on the other rows of the batch."""
    x_0 = torch.randn(5, 3, dtype=torch.float64)

    def samples(rows):
        generators = [generator_of(0, row) for row in rows]
        return consistency(flow, x_0[rows], None, 4, generators)

    together = samples(range(5))
    assert torch.equal(samples([3, 1]), together[[3, 1]])
    assert not torch.equal(consistency(flow, x_0, None, 4, generator_of(0, 0)), together)


def test_one_generator_too_few_is_refused(flow):
    with pytest.raises(ValueError, match="shorter"):
        consistency(flow, torch.randn(2, 3), None, 2, [generator_of(0, 0)])
