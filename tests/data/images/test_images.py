"""The data modules of images: their values and order."""

import pytest
import torch

from decm_lightning.data import Digits
from decm_lightning.data.images.labelled_images import LabelledImages


def ready(module):
    module.setup("fit")
    return module


def test_digits_are_the_1797_of_scikit_learn_scaled_to_plus_minus_one():
    digits = ready(Digits(batch_size=128))
    assert digits.train.images.shape == (1797, 1, 8, 8)
    assert (digits.train.images.min(), digits.train.images.max()) == (-1, 1)
    # The first digit of the set is a zero whose first row is 0 0 5 13 9 1 0 0 of 16.
    assert digits.train.labels[0] == 0
    torch.testing.assert_close(digits.train.images[0, 0, 0] * 8 + 8, torch.tensor([0.0, 0, 5, 13, 9, 1, 0, 0]))


def test_an_epoch_has_every_image_at_most_once_in_its_own_order():
    digits = ready(Digits(batch_size=100))
    loader = digits.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch.x_1 for batch in loader]))
    assert all(len(epoch) == 1700 for epoch in epochs)
    counts = [len(rows.unique(dim=0)) for rows in (epochs[0], digits.train.images)]
    assert counts[0] >= counts[1] - 97
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[0], epochs[2])


def test_a_loader_starts_at_its_position():
    digits = ready(Digits(batch_size=100))
    whole = [batch.condition for batch in digits.train_dataloader()]
    digits._position = lambda: 5
    rest = [batch.condition for batch in digits.train_dataloader()]
    assert len(whole) == 17
    assert len(rest) == 12
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


@pytest.mark.parametrize(
    ("stored", "read"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_images_keep_their_precision_and_latents_become_float32(stored, read):
    images = torch.linspace(-1, 1, 2 * 9, dtype=torch.float64).reshape(2, 1, 3, 3).to(stored)
    batch = LabelledImages(images, torch.arange(2)).__getitems__([1, 0])
    assert batch.x_1.dtype == read
    assert torch.equal(batch.x_1, images[[1, 0]].to(read))
