"""What can be done to a condition whatever its kind."""

import pytest
import torch

from decm_lightning.conditions import first_rows, join


def test_conditions_are_joined_in_order():
    """Labels follow one another; no condition stays none."""
    assert join([torch.tensor([1, 2]), torch.tensor([3])]).tolist() == [1, 2, 3]
    assert join([None, None]) is None


@pytest.mark.parametrize("conditions", [[torch.tensor([1]), None], [None, torch.tensor([1])]])
def test_a_mix_of_conditional_and_unconditional_is_refused(conditions):
    """Conditions are given for all rows or for none."""
    with pytest.raises(ValueError, match="for all rows or for none"):
        join(conditions)


def test_first_rows_are_those_of_the_batch():
    """The condition of the first rows; none of none."""
    assert first_rows(torch.tensor([5, 6, 7]), 2).tolist() == [5, 6]
    assert first_rows(None, 2) is None
