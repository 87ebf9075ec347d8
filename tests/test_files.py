"""Files are written whole or not at all, with the permissions of the umask, and a full disk is named by its path."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from decm_lightning.files import atomic, file_sha256, tensors_sha256


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    """Until then it has another name, next to the final one."""
    file = tmp_path / "new" / "file.txt"
    with atomic(file) as partial:
        partial.write_text("whole")
        assert not file.exists()
        assert partial.parent == file.parent
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """Two files that belong together are either both replaced or both left."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")

    def replace_both() -> None:
        with atomic(first) as one, atomic(second) as two:
            one.write_text("new")
            two.write_text("new")
            raise KeyError("between")

    with pytest.raises(KeyError):
        replace_both()
    assert first.read_text() == "old"
    assert list(tmp_path.iterdir()) == [first]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    """safetensors gives its files mode 600."""
    file, before = tmp_path / "weights.safetensors", os.umask(0o027)
    try:
        with atomic(file) as partial:
            save_file({"x": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [lambda p: p.write_bytes(b"x"), lambda p: save_file({"x": torch.zeros(1)}, p)])
def test_errors_name_the_final_path(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    """/dev/full is a disk without room."""
    file = tmp_path / "file"
    (tmp_path / "file.partial").symlink_to("/dev/full")

    def fill() -> None:
        with atomic(file) as partial:
            write(partial)
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=re.escape(str(file))) as caught:
        fill()
    assert caught.value.filename == str(file)
    assert not file.exists()


def test_a_missing_permission_is_named(tmp_path: Path) -> None:
    """A file stands where the folder would be."""
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="folder"), atomic(tmp_path / "folder" / "file"):
        pass


def test_hashes_tell_content_apart(tmp_path: Path) -> None:
    """Names, shapes, dtypes and values all count; order and strides do not."""
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert file_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    x = torch.arange(6.0).view(2, 3)
    variants = [{"a": x}, {"b": x}, {"a": x.view(3, 2)}, {"a": x.double()}, {"a": x + 1}, {"a": x, "b": x}]
    assert len({tensors_sha256(variant) for variant in variants}) == len(variants)
    assert tensors_sha256({"a": x, "b": x}) == tensors_sha256({"b": x.t().contiguous().t(), "a": x})
