"""Write files atomically, hash files and tensors, and explain why a file cannot be read.

All files of this package are written with `atomic`. All identities are one of the three hashes below.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

PARTIAL = ".partial"
"""Suffix of a file or folder that is still being written."""
PREVIOUS = ".previous"
"""Suffix of a folder that is being replaced."""
FULL = 1 << 20
"""A disk with fewer free bytes than this counts as full."""
ZIP = b"PK\x03\x04"
LARGEST_HEADER = 100_000_000
"""The longest header that safetensors accepts, in bytes."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian integer of 8 bytes."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: it is either complete or absent, even if the process is killed.

    The block writes to the yielded path, a temporary file in the same folder. If the block succeeds, the temporary file
    gets the permissions that the umask allows, is flushed to disk and renamed. If the block fails, the temporary file
    is removed and an existing file is left unchanged. To replace two files together, nest two blocks: neither file is
    renamed before both are written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "settings.json"
        >>> with atomic(path) as partial:
        ...     size = partial.write_text('{"seed": 0}')
        >>> path.read_text()
        '{"seed": 0}'

    Args:
        path: the final path. A missing folder is created.

    Raises:
        OSError: if `path` cannot be written, for example because the disk is full. The error names `path`.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        with _naming(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            # safetensors creates files that only their owner can read.
            partial.chmod(mode)
            with partial.open("rb") as content:
                os.fsync(content.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically, like `atomic`: the block fills the yielded folder, which then replaces `path`.

    If the process is killed between the two renames of `replace_folder`, the next call restores the existing folder.
    """
    partial, previous = (path.with_name(path.name + suffix) for suffix in (PARTIAL, PREVIOUS))

    def clean_up() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        if previous.exists() and not path.exists():
            previous.rename(path)

    clean_up()
    try:
        with _naming(path, partial):
            partial.mkdir(parents=True)
            yield partial
            replace_folder(path, partial)
    finally:
        clean_up()


def replace_folder(path: Path, partial: Path) -> None:
    """Rename a folder to `path`. An existing file or folder there is named `path`.previous meanwhile."""
    previous = path.with_name(path.name + PREVIOUS)
    remove(previous)
    if os.path.lexists(path):
        path.rename(previous)
    partial.rename(path)
    remove(previous)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which may not exist yet. Nothing is created.

    Raises:
        OSError: naming the first existing folder of the path, if it is not writable.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        # Permissions do not show that a disk is full or read-only.
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from error


def shown(path: str | Path) -> str:
    """Return a path to print: relative to the working directory if it is inside, absolute otherwise."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically.

    Raises:
        OSError: if the file cannot be written; see `atomic`.
    """
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors as hexadecimal digits.

    The hash covers names, shapes, dtypes and bytes, sorted by name. Sharded tensors are gathered one at a time, so all
    processes must call this function. They all get the same result.
    """
    # The import takes a second, and the hash of a file does not need it.
    from torch.distributed.tensor import DTensor

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        values = whole.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_unreadable(path: str | Path, text: bool = False) -> str:
    """Explain why a file of tensors (safetensors or torch.save), or of text such as JSON, cannot be read.

    The explanation comes from the file's type, permissions and first bytes. Loaders call this function after a failure,
    because safetensors and torch report a missing permission as "No such file" and any other format as a broken header.

    Returns:
        A phrase such as "permission denied", "no such file", "empty (0 bytes)", "a git-lfs pointer instead of the file:
        run git lfs pull" or "cut short at ..."; "" if the cause is unknown.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return "a folder instead of a file"
        # Opening a named pipe would block until it has a writer.
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        with path.open("rb") as content:
            head = content.read(512)
    except OSError as error:
        if error.errno == errno.ENOENT and path.is_symlink():
            return f"a link to {os.readlink(path)}, which does not exist"
        return os.strerror(error.errno).lower().replace(" or directory", "") if error.errno else str(error)
    return describe_head(head) or ("" if text else _describe_tensors(path, head, status.st_size))


def describe_head(head: bytes) -> str:
    """Explain from its first 512 bytes why a binary file cannot be read; return "" if the cause is unknown.

    Example:
        >>> describe_head(b"version https://git-lfs.github.com/spec/v1")
        'a git-lfs pointer instead of the file: run git lfs pull'
    """
    if not head:
        return "empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer instead of the file: run git lfs pull"
    if head.startswith(b"/annex/objects/"):
        return "a git-annex pointer instead of the file: run git annex get"
    if not head.strip(b"\0"):
        return "all zeros at the beginning: a download or copy was interrupted"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page instead of the file: download it again"
    return ""


def describe_load_error(error: Exception) -> str:
    """Return the cause of a failure of torch.load in one line."""
    if unsafe := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        remedy = "if you trust the file, load it with weights_only=False and save its tensors alone"
        return f"it contains {unsafe[1]}, which could run code; {remedy}"
    # The rest of torch.load's message recommends loading without the safety check.
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def _describe_tensors(path: Path, head: bytes, size: int) -> str:
    """Describe the defect of a file of tensors, which has `size` bytes and begins with `head`; "" if none is found."""
    if head.startswith(ZIP) and not zipfile.is_zipfile(path):
        return f"cut short at {size} bytes: the end of the zip file is missing"
    if head.startswith(ZIP) and path.suffix == ".safetensors":
        return "a zip archive, as torch.save writes"
    # A safetensors file is never all text: its header length has zeros among its 8 bytes.
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text instead of tensors: it begins with {head[:40].decode()!r}"
    return _describe_safetensors(path, size) if path.suffix == ".safetensors" else ""


def _describe_safetensors(path: Path, size: int) -> str:
    """Describe the defect in the header of a safetensors file; return "" if none is found."""
    with path.open("rb") as content:
        length = int.from_bytes(content.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or (length > size - LENGTH_BYTES and length < LARGEST_HEADER):
            return f"cut short at {size} bytes, within its header"
        if length >= LARGEST_HEADER:
            return f"not a safetensors file: it gives {length} bytes as the length of its header"
        text = content.read(length)
    try:
        header = json.loads(text)
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        end = LENGTH_BYTES + length + max((end for _, end in offsets), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return "not a safetensors file: its header is not JSON that lists tensors"
    if size < end:
        return f"cut short at {size} bytes: its header lists tensors up to byte {end}"
    return ""


@contextmanager
def _naming(path: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (cause := _cause(error, partial)) is None:
            raise
        raise OSError(cause, os.strerror(cause), str(path)) from error


def _cause(error: Exception, partial: Path) -> int | None:
    """Return the errno of a failure to write `partial`; None if the error has another cause."""
    if isinstance(error, OSError):
        about = error.filename in (None, str(partial), str(partial.parent), partial.parent)
        return error.errno if about and error.errno else None
    # torch and safetensors report a full disk without an errno.
    if shutil.disk_usage(partial.parent).free < FULL or "No space left" in str(error):
        return errno.ENOSPC
    return None
