"""The data modules: what they hold, in which order, and what they say of bad files."""

import gzip
import struct

import pytest
import torch

from decm_lightning.data import Digits, IDXImages


def write_idx(folder, counts=(6, 4), compress=False, labels=None):
    """Write the four files: image i is all i, label i is i."""
    for part, count in zip(("train", "t10k"), counts, strict=True):
        pixels = b"".join(bytes([i]) * 9 for i in range(count))
        for name, content in (
            (f"{part}-images-idx3-ubyte", struct.pack(">4I", 0x803, count, 3, 3) + pixels),
            (f"{part}-labels-idx1-ubyte", struct.pack(">2I", 0x801, count) + bytes(labels or range(count))),
        ):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


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


def test_an_epoch_holds_every_image_at_most_once_in_an_order_of_its_own():
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


def test_a_loader_begins_where_it_is_told():
    digits = ready(Digits(batch_size=100))
    whole = [batch.condition for batch in digits.train_dataloader()]
    digits._position = lambda: 5
    rest = [batch.condition for batch in digits.train_dataloader()]
    assert len(whole) == 17
    assert len(rest) == 12
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_plain_or_gzipped(compress, tmp_path):
    write_idx(tmp_path, compress=compress)
    module = ready(IDXImages(str(tmp_path), batch_size=2))
    assert module.train.images.shape == (6, 1, 3, 3)
    torch.testing.assert_close(module.train.images[5, 0, 0, 0], torch.tensor(5 / 127.5 - 1))
    assert module.reference.labels.tolist() == [0, 1, 2, 3]


def test_the_reference_can_be_cut(tmp_path):
    write_idx(tmp_path)
    batches = list(ready(IDXImages(str(tmp_path), reference_size=3)).val_dataloader())
    assert torch.cat([batch.condition for batch in batches]).tolist() == [0, 1, 2]


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: give --data.folder"):
        ready(IDXImages(str(tmp_path / "nowhere")))
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="no file t10k-labels-idx1-ubyte or"):
        ready(IDXImages(str(tmp_path)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-5], r"holds 49 values: its header says \(6, 3, 3\)"),
        (lambda content: b"PK" + content[2:], "is not an IDX file of unsigned bytes: it begins with 504b0803"),
        (lambda content: b"", "is not an IDX file"),
    ],
)
def test_a_spoilt_file_is_refused(spoil, message, tmp_path):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        ready(IDXImages(str(tmp_path)))


def test_a_gzip_file_cut_short_is_refused(tmp_path):
    write_idx(tmp_path, compress=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        ready(IDXImages(str(tmp_path)))


def test_a_label_out_of_range_is_named_by_its_row(tmp_path):
    write_idx(tmp_path, counts=(4, 4), labels=[0, 1, 12, 3])
    with pytest.raises(ValueError, match="row 2 is 12, above 9"):
        ready(IDXImages(str(tmp_path)))


def test_files_that_do_not_fit_each_other_are_refused(tmp_path):
    write_idx(tmp_path, counts=(6, 4))
    labels = struct.pack(">2I", 0x801, 5) + bytes(5)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match="do not fit each other"):
        ready(IDXImages(str(tmp_path)))
