"""Files that are whole or absent, the content of files and tensors by its hash, and why a file cannot be read.

Every file of this package is written through `atomic`, and every identity is one of the three hashes below.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

PARTIAL = ".partial"
"""The ending of a file that is still being written."""
FULL = 1 << 20
"""A disk with fewer free bytes than this is full."""
ZIP = b"PK\x03\x04"
LARGEST_HEADER = 100_000_000
"""safetensors refuses longer ones, in bytes."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian integer of 8 bytes."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Write a file that is complete under its name or absent, even if the process is killed.

    The block writes to the yielded path, next to the final one. When the block succeeds, the file gets the permissions
    that the umask allows, is flushed to disk and renamed. When it fails, it is removed, and a file that already had the
    name is untouched. Nest two of them to replace two files together: neither is renamed before both are written.

    Example:
        >>> with atomic(folder / "settings.json") as partial:
        ...     partial.write_text(json.dumps(settings))

    Args:
        path: the final name; its folder is created if it is missing.

    Raises:
        OSError: naming `path`, if it cannot be written, for example because the disk is full.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        # safetensors gives its files to their owner alone.
        partial.chmod(mode)
        with partial.open("rb") as content:
            os.fsync(content.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (cause := _cause(error, partial)) is None:
            raise
        raise OSError(cause, os.strerror(cause), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a file of JSON, whole or not at all.

    Raises:
        OSError: as `atomic`.
    """
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors in hexadecimal digits: of their names, shapes, dtypes and bytes, sorted by name.

    Sharded tensors are gathered one by one, so all processes must call it and get the same digits.
    """
    # Imported here: it takes a second, and a file's own hash does not need it.
    from torch.distributed.tensor import DTensor

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        values = whole.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_unreadable(path: str | Path, text: bool = False) -> str:
    """Say why a file of tensors (safetensors or torch.save) cannot be read, from its kind, permissions and first bytes.

    Loaders call this after a failure: safetensors and torch report a missing permission as "No such file", and
    anything that is not in their format as a broken header.

    Example:
        >>> raise ValueError(f"{file}: {describe_unreadable(file) or error}")

    Args:
        path: the file.
        text: it should hold text, such as JSON, instead of tensors.

    Returns:
        A phrase such as "permission denied", "no such file", "a folder instead of a file", "empty (0 bytes)", "a
        git-lfs pointer instead of the file: run git lfs pull" or "cut short: ..."; empty if nothing is known.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return "a folder instead of a file"
        # Opening a pipe would wait for its writer.
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
    """Say by its first 512 bytes why a file of any format but text cannot be read; return "" if they do not tell.

    A pointer of git-lfs, for example, is "a git-lfs pointer instead of the file: run git lfs pull".
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


def _describe_tensors(path: Path, head: bytes, size: int) -> str:
    """Return what is wrong with a file of tensors of `size` bytes that begins with `head`, empty if nothing is."""
    if head.startswith(ZIP) and not zipfile.is_zipfile(path):
        return f"cut short at {size} bytes: a zip file without an end"
    if head.startswith(ZIP) and path.suffix == ".safetensors":
        return "a zip archive, as torch.save writes"
    # The length of a safetensors header has zeros among its 8 bytes.
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text instead of tensors: it begins with {head[:40].decode()!r}"
    return _describe_safetensors(path, size) if path.suffix == ".safetensors" else ""


def _describe_safetensors(path: Path, size: int) -> str:
    """Return what is wrong with the header of a safetensors file, empty if nothing is."""
    with path.open("rb") as content:
        length = int.from_bytes(content.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or (length > size - LENGTH_BYTES and length < LARGEST_HEADER):
            return f"cut short at {size} bytes, within its header"
        if length >= LARGEST_HEADER:
            return "not a safetensors file: its header would have no end"
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


def _cause(error: Exception, partial: Path) -> int | None:
    """Return the errno behind an error in writing `partial`, None if it is about something else."""
    if isinstance(error, OSError):
        about = error.filename in (None, str(partial), str(partial.parent), partial.parent)
        return error.errno if about and error.errno else None
    # torch and safetensors report a full disk without an errno.
    if shutil.disk_usage(partial.parent).free < FULL or "No space left" in str(error):
        return errno.ENOSPC
    return None
