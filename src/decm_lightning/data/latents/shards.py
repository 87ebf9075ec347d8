"""Read folders of latents in LightningDiT's format: safetensors shards, checked by header and read row by row."""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decm_lightning.files import describe_unreadable

LATENTS, MIRRORED, LABELS = KEYS = ("latents", "latents_flip", "labels")
FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = ("U8", "I8", "I16", "I32", "I64")
ENDING = ".safetensors"
UNFINISHED = (".partial", ".part", ".tmp", ".incomplete", ".crdownload")
"""Suffixes of files that are still being written or downloaded."""
BFLOAT16 = np.uint16
BLOCK = 64


class Shards:
    """The rows of all `*.safetensors` files in a folder, sorted by file name. No file is loaded into memory as a whole.

    A file holds `latents` (n, c, h, w), `latents_flip` for the mirrored images, and `labels` (n,). Only headers and
    labels are read at first. Of N images in total, item i is image i, and item N + i is image i mirrored.

    Args:
        folder: folder of the files. Hidden and unfinished files are skipped and counted in `skipped`.
        num_classes: labels must be below it; None for the largest label plus 1.
        report: receives the kind of each error and the error, which is raised if `report` is None. If `report` returns,
            an unusable file is left out, but a file with invalid labels is not.

    Raises:
        FileNotFoundError: if the folder does not exist or has no shard.
        ValueError: if a file cannot be read, is empty, lacks a key, has an invalid shape or type, or has a label
            outside of [0, num_classes). The message names the file, and the row of a label. Also if no file is usable.
    """

    def __init__(
        self,
        folder: str | Path,
        num_classes: int | None = None,
        report: Callable[[str, ValueError], object] | None = None,
    ) -> None:
        report = report or _raise
        self.folder = Path(folder)
        files, self.skipped = find_files(self.folder)
        self.files: list[Path] = []
        self.shape: tuple[int, ...] = ()
        parts: list[Tensor] = []
        for file in files:
            try:
                shape, labels = read_head(file)
                if parts and shape != self.shape:
                    raise ValueError(f"{file}: latents are {shape}, but those in {self.files[0].name} are {self.shape}")
            except ValueError as error:
                report("shard", error)
                continue
            try:
                check_labels(file, labels, num_classes)
            except ValueError as error:
                report("label file", error)
            self.shape = shape
            self.files.append(file)
            parts.append(labels)
        if not parts:
            raise ValueError(f"none of the {len(files)} shards in {folder} can be used")
        self.left_out = len(files) - len(self.files)
        self.ends = list(accumulate(map(len, parts)))
        self.labels: Int[Tensor, " n"] = torch.cat(parts)
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self.mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, items: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Return the stored latents of the items in float32."""
        mirrored, images = np.divmod(np.asarray(items), len(self))
        shards = np.searchsorted(self.ends, images, side="right")
        rows = images - np.asarray([0, *self.ends])[shards]
        numbers = (2 * shards + mirrored).tolist()
        arrays = {number: self._map(number) for number in set(numbers)}
        bfloat16 = {number for number, array in arrays.items() if array.dtype == BFLOAT16}
        # numpy requests huge pages and torch does not, so a numpy batch has fewer page faults.
        batch = np.empty((len(items), *self.shape), np.float32)
        bits = batch.view(np.uint32)
        with np.errstate(over="ignore"):
            for i, (number, row) in enumerate(zip(numbers, rows.tolist(), strict=True)):
                if number in bfloat16:
                    bits[i] = arrays[number][row]
                    bits[i] <<= 16
                else:
                    batch[i] = arrays[number][row]
        return torch.from_numpy(batch)

    def find(self, item: int) -> tuple[int, int, int]:
        """Return the position of an item: 0 for latents or 1 for latents_flip, the number of the file, and the row."""
        mirrored, image = divmod(item, len(self))
        shard = bisect_right(self.ends, image)
        return mirrored, shard, image - (self.ends[shard - 1] if shard else 0)

    def place(self, item: int) -> str:
        """Return the position of an item as text: file, row and key."""
        mirrored, shard, row = self.find(item)
        return f"{self.files[shard]}: row {row} of {KEYS[mirrored]}"

    def blocks(self) -> list[range]:
        """Return all items as ranges of at most 64."""
        return [range(start, min(start + BLOCK, 2 * len(self))) for start in range(0, 2 * len(self), BLOCK)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mapped": {}}  # a pickle would contain whole files

    def _map(self, number: int) -> np.ndarray:
        """Return latents (even numbers) or latents_flip (odd numbers) of a file, mapped into memory."""
        # Mapping a file costs more than reading ten rows, so it is done once.
        if number not in self.mapped:
            tensor = open_file(self.files[number // 2]).get_tensor((LATENTS, MIRRORED)[number % 2])
            # numpy has no bfloat16. Its bits are the upper half of a float32.
            self.mapped[number] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return self.mapped[number]


def _raise(kind: str, error: ValueError) -> None:
    raise error


def find_files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Return the shards of a folder, sorted by name, and the number of hidden and unfinished files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a folder of safetensors shards with {', '.join(KEYS)}")
    # Path.glob returns nothing for a folder without read permission.
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
    """Describe the number of skipped files by kind."""
    return "skipped " + " and ".join(
        f"{count} {kind} {'file' if count == 1 else 'files'}" for kind, count in skipped.items()
    )


def open_file(file: Path) -> Any:
    """Open a safetensors file. Its tensors are mapped into memory, not loaded."""
    # Opening a named pipe would block until it has a writer.
    if not file.is_file():
        raise ValueError(f"{file}: {describe_unreadable(file)}")
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {describe_unreadable(file) or error}") from error


def read_head(file: Path) -> tuple[tuple[int, ...], Int[Tensor, " n"]]:
    """Check the header of a file, and return the shape (c, h, w) of a latent and all labels."""
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
        raise ValueError(f"{file}: {found} do not match: expected (n, c, h, w) twice and (n,)")
    if shape[0] == 0:
        raise ValueError(f"{file} is empty: a shard needs at least one row")
    return shape[1:], content.get_tensor(LABELS).long()


def check_labels(file: Path, labels: Int[Tensor, " n"], num_classes: int | None) -> None:
    """Refuse labels outside of [0, num_classes)."""
    bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if bad.any():
        row, others = int(bad.nonzero()[0]), int(bad.sum()) - 1
        limit = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        more = f" ({others} more rows have this error)" if others else ""
        raise ValueError(f"{file}: row {row} of labels is {labels[row]}: expected {limit}{more}")
