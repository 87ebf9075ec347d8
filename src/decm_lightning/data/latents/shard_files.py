"""The safetensors files of a folder of latents: which of them are read, and the checks of each."""

import os
from pathlib import Path
from typing import Any

from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decm_lightning.files import describe_unreadable

LATENTS, MIRRORED, LABELS = KEYS = ("latents", "latents_flip", "labels")
FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = ("U8", "I8", "I16", "I32", "I64")
ENDING = ".safetensors"
UNFINISHED = (".partial", ".part", ".tmp", ".incomplete", ".crdownload")
"""What writers and downloads append to the name of a file until it is complete."""


def find_files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Return the shards of a folder, sorted by name, and how many files with similar names were skipped, by kind.

    Raises:
        FileNotFoundError: if the folder does not exist, or has no shard.
        PermissionError: if it cannot be listed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one of safetensors shards with {', '.join(KEYS)}")
    # Path.glob returns nothing for a folder that it may not read.
    names = sorted(os.listdir(folder))
    shards = [name for name in names if name.endswith(ENDING) and not name.startswith(".")]
    hidden = sum(name.startswith(".") and ENDING in name for name in names)
    unfinished = sum(
        not name.startswith(".") and name.endswith(tuple(ENDING + end for end in UNFINISHED)) for name in names
    )
    skipped = {kind: count for kind, count in (("hidden", hidden), ("unfinished", unfinished)) if count}
    if not shards:
        others = f" ({describe_skipped(skipped)})" if skipped else ""
        raise FileNotFoundError(f"no *{ENDING} file in {folder}{others}: expected shards with {', '.join(KEYS)}")
    return [folder / name for name in shards], skipped


def describe_skipped(skipped: dict[str, int]) -> str:
    """Describe how many files of each kind were skipped."""
    return "skipped " + " and ".join(
        f"{count} {kind} {'file' if count == 1 else 'files'}" for kind, count in skipped.items()
    )


def open_file(file: Path) -> Any:
    """Return an open safetensors file, whose tensors are mapped into memory, not loaded.

    Raises:
        ValueError: naming the file and why it cannot be read.
    """
    # Opening a pipe would wait for its writer.
    if not file.is_file():
        raise ValueError(f"{file}: {describe_unreadable(file)}")
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {describe_unreadable(file) or error}") from error


def read_head(file: Path) -> tuple[tuple[int, ...], Int[Tensor, " n"]]:
    """Return the shape (c, h, w) of a latent and all labels of a file, after checks of everything its header says.

    Raises:
        ValueError: naming the file, if it cannot be read, is empty, lacks a key, or has a shape or type that does not
            fit.
    """
    content = open_file(file)
    missing = [key for key in KEYS if key not in content.keys()]  # noqa: SIM118 - it is not a dictionary
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: a shard has {', '.join(KEYS)}")
    slices = {key: content.get_slice(key) for key in KEYS}
    for key, types in ((LATENTS, FLOATS), (MIRRORED, FLOATS), (LABELS, INTEGERS)):
        if slices[key].get_dtype() not in types:
            raise ValueError(f"{file}: {key} are {slices[key].get_dtype()}: expected one of {', '.join(types)}")
    shape, mirrored, labels = (tuple(slices[key].get_shape()) for key in KEYS)
    if len(shape) != 4 or 0 in shape[1:] or mirrored != shape or labels != shape[:1]:
        found = f"latents {shape}, latents_flip {mirrored}, labels {labels}"
        raise ValueError(f"{file}: {found} do not fit each other: expected (n, c, h, w) twice and (n,)")
    if shape[0] == 0:
        raise ValueError(f"{file} is empty: a shard needs at least one row")
    return shape[1:], content.get_tensor(LABELS).long()


def check_labels(file: Path, labels: Int[Tensor, " n"], num_classes: int | None) -> None:
    """Refuse labels outside of [0, num_classes).

    Raises:
        ValueError: naming the file, the first such row, and how many more there are.
    """
    bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if bad.any():
        row, others = int(bad.nonzero()[0]), int(bad.sum()) - 1
        limit = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        more = f" ({others} more rows like it)" if others else ""
        raise ValueError(f"{file}: row {row} of labels is {labels[row]}: expected {limit}{more}")
