"""The files below a folder, through links, without hidden ones."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files below a folder whose names end with one of `suffixes`, sorted.

    Linked files and folders are followed, each folder once, so that links in a circle end. Files and folders whose
    names begin with a dot are skipped. A link to a file that does not exist is returned, so that reading it fails.

    Args:
        folder: where to look.
        suffixes: in lower case, such as ".tar.gz"; the names of files may be in upper case.

    Raises:
        OSError: if a folder cannot be read.
    """
    return sorted(path for path in _walk(folder, set()) if path.name.lower().endswith(tuple(suffixes)))


def _walk(folder: Path, visited: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        # Unlike Path.is_dir, these return False for a link to itself.
        if os.path.isdir(path):
            yield from _walk(path, visited)
        elif os.path.isfile(path) or os.path.islink(path):
            yield path
