"""Files that are whole or absent, and the content of files and tensors by its hash.

Every file of this package is written through `atomic`, and every identity is one of the two hashes below.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

PARTIAL = ".partial"
"""The ending of a file that is still being written."""
FULL = 1 << 20
"""A disk with fewer free bytes than this is full."""


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


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors in hexadecimal digits: of their names, shapes, dtypes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _cause(error: Exception, partial: Path) -> int | None:
    """Return the errno behind an error in writing `partial`, None if it is about something else."""
    if isinstance(error, OSError):
        about = error.filename in (None, str(partial), str(partial.parent), partial.parent)
        return error.errno if about and error.errno else None
    # torch and safetensors report a full disk in words of their own.
    if shutil.disk_usage(partial.parent).free < FULL or "No space left" in str(error):
        return errno.ENOSPC
    return None
