"""The folder of an export: checked before it is written, and replaced as a whole."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from decm_lightning.export.card import CARD, GRID
from decm_lightning.files import atomic_folder

INDEX = "model_index.json"
CLASS = "FlowMap"
"""The prefix of the names of all pipeline classes."""
OWN = (CARD, GRID, ".gitattributes")
"""Files that a new export keeps."""


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
    """Write an export atomically: the block fills the yielded folder, which then replaces all but the OWN files."""
    with atomic_folder(folder) as partial:
        yield partial
        for name in OWN:
            if (folder / name).exists():
                shutil.copy2(folder / name, partial)
        mode = (partial / INDEX).stat().st_mode
        for file in partial.rglob("*.safetensors"):
            # safetensors creates files that only their owner can read.
            file.chmod(mode)
