"""Grids with names, checked in the PNG that was written."""

import numpy as np
import pytest
import torch
from PIL import Image

from decm_lightning.errors import NonFiniteError
from decm_lightning.image_writer import save_named_grid, short, to_uint8

COLOURS = torch.tensor([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 0]], [[200, 0, 200], [0, 200, 200]]])


def found(file):
    """Return the patches of color in an image: {color: (row, column) of its middle}."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    places = {}
    for colour in COLOURS.flatten(0, 1).tolist():
        rows, columns = (np.abs(pixels - colour).max(-1) < 10).nonzero()
        places[tuple(colour)] = (rows.mean(), columns.mean())
    return places


@pytest.mark.parametrize("columns", [(), ("1 step", "4 steps"), ("a long name of a column", "another")])
def test_images_are_in_their_rows_and_columns_next_to_their_names(columns, tmp_path):
    images = COLOURS.to(torch.uint8)[..., None, None].expand(-1, -1, -1, 16, 16)
    file = tmp_path / "new" / "grid.png"
    save_named_grid(images, ["one", "two", "three"], columns, file)
    places = found(file)
    rows = torch.tensor([[places[tuple(colour)] for colour in row] for row in COLOURS.tolist()])
    assert torch.allclose(rows[:, 0, 0], rows[:, 1, 0], atol=1)
    assert torch.allclose(rows[0, :, 1], rows[2, :, 1], atol=1)
    assert (rows[:, :, 0].diff(dim=0) > 30).all()
    assert (rows[:, :, 1].diff(dim=1) > 30).all()
    pixels = np.asarray(Image.open(file).convert("L"))
    left, top = (int(place) for place in (rows[0, 0, 1] - 60, rows[0, 0, 0] - 50))
    # Something is written left of the rows, and above them only where columns have names.
    assert (pixels[:, : max(left, 1)] < 100).any()
    assert (pixels[: max(top, 1)] < 100).any() == bool(columns)


def test_latents_are_not_images(tmp_path):
    with pytest.raises(ValueError, match="images have 1 or 3 channels: got 4"):
        save_named_grid(torch.zeros(1, 1, 4, 8, 8, dtype=torch.uint8), ["row"], (), tmp_path / "grid.png")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_refused(value):
    x = torch.zeros(2, 1, 8, 8)
    x[1, 0, 3, 3] = value
    with pytest.raises(NonFiniteError, match="images"):
        to_uint8(x)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("red heart, love, like", "red heart"), ("a very long caption about many things", "a very long caption ...")],
)
def test_a_caption_is_cut_to_what_fits_above_an_image(caption, expected):
    assert short(caption) == expected
