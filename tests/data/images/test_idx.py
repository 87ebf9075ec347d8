"""IDX files: their content, and the errors of damaged files."""

import gzip
import struct

import pytest
import torch

from decm_lightning.data import IDXImages
from tests.test_files import LFS
from tests.unprivileged import open_folder, unprivileged


def write_idx(folder, counts=(6, 4), compress=False, labels=None):
    """Write the four files. All pixels of image i are i, and its label is i."""
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


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_plain_or_gzipped(compress, tmp_path):
    write_idx(tmp_path, compress=compress)
    module = ready(IDXImages(str(tmp_path), batch_size=2))
    assert module.train.images.shape == (6, 1, 3, 3)
    torch.testing.assert_close(module.train.images[5, 0, 0, 0], torch.tensor(5 / 127.5 - 1))
    assert module.reference.labels.tolist() == [0, 1, 2, 3]


def test_the_reference_can_be_limited(tmp_path):
    write_idx(tmp_path)
    batches = list(ready(IDXImages(str(tmp_path), reference_size=3)).val_dataloader())
    assert torch.cat([batch.condition for batch in batches]).tolist() == [0, 1, 2]


def test_class_names_give_the_number_of_classes_and_are_recorded(tmp_path):
    write_idx(tmp_path)
    plain = ready(IDXImages(str(tmp_path)))
    assert (plain.num_classes, plain.record().class_names) == (10, ())
    named = ready(IDXImages(str(tmp_path), class_names=list("abcdef")))
    assert (named.num_classes, named.record().class_names) == (6, tuple("abcdef"))
    with pytest.raises(ValueError, match=r"row 5 is 5: expected at most 4$"):
        ready(IDXImages(str(tmp_path), class_names=list("abcde")))


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: .*--data.folder"):
        ready(IDXImages(str(tmp_path / "nowhere")))
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="no file t10k-labels-idx1-ubyte or"):
        ready(IDXImages(str(tmp_path)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], r"holds 49 values, .* \(6, 3, 3\)"),
        (lambda content: content + b"x", r"holds 55 values, .* \(6, 3, 3\)"),
        (lambda content: b"PK" + content[2:], "not an IDX file of unsigned bytes: it begins with 504b0803"),
        (
            lambda content: content[:2] + b"\x0d" + content[3:],
            "of unsigned bytes: it begins with 00000d03",
        ),
        (lambda content: b"", r"empty \(0 bytes\)"),
        (lambda content: content[:2], "a download or copy was interrupted"),
        (lambda content: content[:10], "cut short in the header of an IDX file, after 10 bytes"),
        (lambda content: content[:3], "cut short in the header of an IDX file, after 3 bytes"),
        (lambda content: content[:3] + b"\0" + content[4:], "cut short in the header"),
        (lambda content: content[:4] + b"\xff" * 12, r"holds 0 values, .* \(4294967295, "),
        (lambda content: LFS.encode(), "git lfs pull"),
        (lambda content: b"<html></html>", "web page"),
        (lambda content: gzip.compress(content)[:-20] + bytes(20), "gzip"),
        (lambda content: gzip.compress(content)[:12] + bytes(50), "gzip"),
        (lambda content: b"\x1f\x8b" + bytes(50), "gzip"),
    ],
)
def test_a_damaged_file_is_refused(damage, message, tmp_path):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        ready(IDXImages(str(tmp_path)))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_by_its_content_not_its_name(tmp_path):
    """Browsers decompress downloads without a change of name."""
    write_idx(tmp_path)
    for file in tmp_path.glob("*"):
        file.rename(f"{file}.gz")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes())
    )
    assert ready(IDXImages(str(tmp_path))).reference.labels.tolist() == [0, 1, 2, 3]


def test_a_folder_a_link_and_a_missing_permission_are_named(tmp_path):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.unlink()
    file.symlink_to("gone")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: .*gone"):
        ready(IDXImages(str(tmp_path)))
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: a folder instead of a file"):
        ready(IDXImages(str(tmp_path)))
    with open_folder() as folder:
        write_idx(folder)
        (folder / file.name).chmod(0)
        with unprivileged(), pytest.raises(ValueError, match=r"train-images-idx3-ubyte: permission denied"):
            ready(IDXImages(str(folder)))


def test_files_without_images_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 0, 3, 3))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 0))
    with pytest.raises(ValueError, match=r"t10k files in .* hold no images: \(0, 3, 3\)"):
        ready(IDXImages(str(tmp_path)))


def test_a_gzip_file_cut_short_is_refused(tmp_path):
    write_idx(tmp_path, compress=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ValueError, match="gzip"):
        ready(IDXImages(str(tmp_path)))


def test_a_label_out_of_range_is_named_by_its_row(tmp_path):
    write_idx(tmp_path, counts=(4, 4), labels=[0, 1, 12, 3])
    with pytest.raises(ValueError, match=r"row 2 is 12: .* 9$"):
        ready(IDXImages(str(tmp_path)))


def test_files_that_do_not_match_are_refused(tmp_path):
    write_idx(tmp_path, counts=(6, 4))
    labels = struct.pack(">2I", 0x801, 5) + bytes(5)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=r"train files .*\(6, 3, 3\).*\(5,\)"):
        ready(IDXImages(str(tmp_path)))
