"""Files are written atomically, with the permissions of the umask, and errors name the path."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from decm_lightning.files import atomic, describe_unreadable, file_sha256, shown, tensors_sha256
from tests.unprivileged import open_folder, unprivileged


def test_paths_outside_the_working_directory_are_shown_absolute(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert shown(tmp_path / "here" / "runs" / "last.ckpt") == shown("runs/last.ckpt") == "runs/last.ckpt"
    assert shown(tmp_path / "there") == str(tmp_path / "there")


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    """Until then it has another name in the same folder."""
    file = tmp_path / "new" / "file.txt"
    with atomic(file) as partial:
        partial.write_text("whole")
        assert not file.exists()
        assert partial.parent == file.parent
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """Two files that belong together are either both replaced or both unchanged."""
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
    """safetensors writes files with mode 600."""
    file, before = tmp_path / "weights.safetensors", os.umask(0o027)
    try:
        with atomic(file) as partial:
            save_file({"x": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("write", [lambda p: p.write_bytes(b"x"), lambda p: save_file({"x": torch.zeros(1)}, p)])
def test_errors_name_the_final_path(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    """/dev/full acts as a full disk."""
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
    """A file has the name of the folder."""
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="folder"), atomic(tmp_path / "folder" / "file"):
        pass


def test_hashes_tell_content_apart(tmp_path: Path) -> None:
    """The hash depends on names, shapes, dtypes and values, but not on order or strides."""
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert file_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    x = torch.arange(6.0).view(2, 3)
    variants = [{"a": x}, {"b": x}, {"a": x.view(3, 2)}, {"a": x.double()}, {"a": x + 1}, {"a": x, "b": x}]
    assert len({tensors_sha256(variant) for variant in variants}) == len(variants)
    assert tensors_sha256({"a": x, "b": x}) == tensors_sha256({"b": x.t().contiguous().t(), "a": x})


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 2700000000\n"
WHOLE = save({"x": torch.zeros(100)})
HEADER = int.from_bytes(WHOLE[:8], "little")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty (0 bytes)"),
        (LFS.encode(), "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--a.pt\n", "git annex get"),
        (b"<!DOCTYPE html>\n<html></html>", "web page"),
        (b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"Entry not found", "text instead of tensors: it begins with 'Entry not found'"),
        (b"\0" * 1000, "zeros"),
        (b"PK\x03\x04" + b"\0" * 100, "cut short at 104 bytes"),
        (WHOLE[:5], "cut short at 5 bytes"),
        (WHOLE[:20], "cut short at 20 bytes"),
        (WHOLE[:-1], f"cut short at {len(WHOLE) - 1} bytes: its header lists tensors up to byte {len(WHOLE)}"),
        (WHOLE[:8] + b"{" * HEADER + WHOLE[8 + HEADER :], "header is not JSON"),
        (WHOLE[:8] + b"[]".ljust(HEADER) + WHOLE[8 + HEADER :], "header is not JSON"),
        (WHOLE[:8] + b'{"a": 1}'.ljust(HEADER) + WHOLE[8 + HEADER :], "header is not JSON"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 90, "not a safetensors file"),
        (WHOLE, ""),
    ],
)
def test_an_unreadable_file_is_described_by_its_content(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    assert said in describe_unreadable(file)
    assert bool(said) == bool(describe_unreadable(file))


def test_an_unreadable_file_is_described_by_its_kind(tmp_path: Path) -> None:
    """A named pipe is not opened, because that would block."""
    file = tmp_path / "a.safetensors"
    assert describe_unreadable(file) == "no such file"
    assert describe_unreadable(file / "b") == "no such file"
    file.symlink_to(tmp_path / "gone")
    assert describe_unreadable(file) == f"a link to {tmp_path / 'gone'}, which does not exist"
    file.unlink()
    file.mkdir()
    assert describe_unreadable(file) == "a folder instead of a file"
    file.rmdir()
    os.mkfifo(file)
    assert describe_unreadable(file) == "not a regular file"


def test_a_missing_permission_is_not_a_missing_file() -> None:
    """The permission is missing for the file or for its folder."""
    with open_folder() as folder:
        file = folder / "in" / "a.safetensors"
        file.parent.mkdir()
        file.write_bytes(WHOLE)
        file.chmod(0)
        with unprivileged():
            assert describe_unreadable(file) == "permission denied"
        file.chmod(0o644)
        file.parent.chmod(0)
        with unprivileged():
            assert describe_unreadable(file) == "permission denied"
