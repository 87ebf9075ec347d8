"""Teacher training refuses invalid arguments when it is created."""

import pytest

from decm_lightning import TeacherTraining
from decm_lightning.networks import MLP


@pytest.mark.parametrize("name", ["class_dropout", "ema_decay"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\): got {value}"):
        TeacherTraining(MLP(), **{name: value})
