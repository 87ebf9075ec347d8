"""Operations on conditions of every kind."""

import pytest
import torch

from decm_lightning.conditions import join, select, where
from decm_lightning.types import Captions


def captions(*values: float) -> Captions:
    """Captions of two tokens with one value each."""
    tokens = torch.tensor(values)[:, None, None].expand(-1, 2, 3)
    return Captions(tokens, tokens[..., 0] > 0)


def test_conditions_are_joined_in_order():
    """Labels and the parts of captions are concatenated; None stays None."""
    assert join([torch.tensor([1, 2]), torch.tensor([3])]).tolist() == [1, 2, 3]
    assert join([None, None]) is None
    joined = join([captions(1, -2), captions(3)])
    assert joined.tokens[:, 0, 0].tolist() == [1, -2, 3]
    assert joined.mask[:, 0].tolist() == [True, False, True]
    assert joined.pooled is None


@pytest.mark.parametrize("condition", [torch.tensor([1]), captions(1)], ids=["labels", "captions"])
@pytest.mark.parametrize("first", [True, False])
def test_a_mix_of_conditional_and_unconditional_is_refused(condition, first):
    """Conditions must be passed for all rows or for none."""
    conditions = [condition, None] if first else [None, condition]
    with pytest.raises(ValueError, match="conditions"):
        join(conditions)
    with pytest.raises(ValueError, match="conditions"):
        where(torch.tensor([True]), *conditions)


def test_captions_with_and_without_a_mask_are_not_mixed():
    """A mask is not dropped silently."""
    bare = captions(1)._replace(mask=None)
    for first, second in ((captions(1), bare), (bare, captions(1))):
        with pytest.raises(ValueError, match="mask and pooled vectors"):
            join([first, second])


def test_rows_are_selected_by_slice_and_by_number():
    """Selected rows; None stays None."""
    assert select(torch.tensor([5, 6, 7]), slice(2)).tolist() == [5, 6]
    assert select(torch.tensor([5, 6, 7]), torch.tensor([2, 0])).tolist() == [7, 5]
    assert select(None, slice(2)) is None
    some = select(captions(5, -6, 7), torch.tensor([1, 2]))
    assert some.tokens[:, 0, 0].tolist() == [-6, 7]
    assert some.mask[:, 0].tolist() == [False, True]
    assert some.pooled is None


def test_where_selects_rows_from_one_of_two():
    """The first where true and the second elsewhere, in every part."""
    rows = torch.tensor([True, False])
    assert where(rows, torch.tensor([1, 2]), torch.tensor([3, 4])).tolist() == [1, 4]
    assert where(rows, None, None) is None
    mixed = where(rows, captions(1, 2), captions(-3, -4))
    assert mixed.tokens[:, 1, 2].tolist() == [1, -4]
    assert mixed.mask[:, 0].tolist() == [True, False]
