"""The folder of an export: checked before it is written, and replaced as a whole."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from os import strerror
from pathlib import Path

from safetensors import SafetensorError

from decm_lightning.export.card import CARD, GRID
from decm_lightning.files import PARTIAL

INDEX = "model_index.json"
CLASS = "FlowMap"
"""The prefix of the names of all pipeline classes."""
OWN = (CARD, GRID, ".gitattributes")
"""Files that a new export keeps."""
OLD = ".old"


def check_target(out: str | Path) -> Path:
    """Return the folder `out` if an export may replace it: it must not exist, be empty, or contain only an export.

    Raises:
        NotADirectoryError: if it is a file.
        ValueError: if it has no name, or contains anything else.
    """
    folder = Path(out)
    if not folder.name:
        raise ValueError(f"the output folder must have a name: got {str(out)!r}")
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose a folder")
    found = {entry.name for entry in folder.iterdir()}
    if other := sorted(found - _expected(folder)):
        raise ValueError(f"{folder} contains {other[0]}, which is not part of an export: choose another folder")
    return folder


def _expected(folder: Path) -> set[str]:
    """Return the names of the files and folders of the export in a folder; none if it contains no export."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        module, name = index["_class_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return set()
    return {INDEX, *OWN, f"{module}.py", *index} if name.startswith(CLASS) else set()


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Write a folder as a whole: the block fills the yielded folder, which then replaces `folder`.

    If the block fails or the process is killed, an existing folder stays as it is.

    Raises:
        OSError: if the disk is full.
    """
    partial, old = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        # An earlier export was killed between its two renames.
        old.rename(folder)
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        yield partial
        for name in OWN:
            if (folder / name).exists():
                shutil.copy2(folder / name, partial)
        mode = (partial / INDEX).stat().st_mode
        for file in partial.rglob("*.safetensors"):
            # safetensors creates files that only their owner can read.
            file.chmod(mode)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(ENOSPC, strerror(ENOSPC), str(folder)) from error
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
