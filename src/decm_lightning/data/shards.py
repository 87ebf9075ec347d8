"""Folders of latents in LightningDiT's format: safetensors shards read row by row, and the record of their origin."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

LATENTS, MIRRORED, LABELS = KEYS = ("latents", "latents_flip", "labels")
FLOATS = ("F16", "BF16", "F32", "F64")
INTEGERS = ("U8", "I8", "I16", "I32", "I64")
RECORD = "cache.json"
MANIFEST = "manifest"


class Shards:
    """The rows of all `*.safetensors` files of a folder, in the order of their names; no file is ever loaded whole.

    A file holds `latents` (n, c, h, w), `latents_flip`, the same of the mirrored images, and `labels` (n,). Opening
    reads headers and labels only. Of N images in all, item i is image i, and item N + i is image i mirrored.

    Args:
        folder: where the files are.
        num_classes: labels must be below it; None for one more than the largest label.

    Raises:
        FileNotFoundError: if there is no such folder, or no file in it.
        ValueError: naming the file, if one is cut short, empty, lacks a key, has a shape or type that does not fit, or
            has a label outside of [0, num_classes), naming its row, too.
    """

    def __init__(self, folder: str | Path, num_classes: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: expected one of safetensors shards with {', '.join(KEYS)}")
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            raise FileNotFoundError(f"no *.safetensors file in {folder}: expected shards with {', '.join(KEYS)}")
        parts: list[Tensor] = []
        for file in self.files:
            shape, labels = _read_head(file)
            if not parts:
                self.shape = shape
            if shape != self.shape:
                raise ValueError(f"{file}: latents are {shape}, but {self.shape} in {self.files[0].name}")
            _check_labels(file, labels, num_classes)
            parts.append(labels)
        self.ends = list(accumulate(map(len, parts)))
        self.labels: Int[Tensor, " n"] = torch.cat(parts)
        self.num_classes = int(self.labels.max()) + 1 if num_classes is None else num_classes
        self._forget()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def read(self, items: Sequence[int]) -> Float[Tensor, "b c h w"]:
        """Return the latents of the items as they are on the disk, in float32."""
        # A row is a view of the mapped file, which must not leave this process: a worker would send all of its shard.
        return torch.stack([self._row(item).float() for item in items])

    def place(self, item: int) -> str:
        """Return where an item is, in words."""
        shard, row = self._find(item)
        return f"{self.files[shard]}: row {row} of {KEYS[item // len(self)]}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}  # open files cannot be pickled

    def _forget(self) -> None:
        self.process = os.getpid()
        self.opened: dict[int, tuple[Any, Any]] = {}

    def _row(self, item: int) -> Float[Tensor, "c h w"]:
        # Opened by the process that reads, and kept: opening a file costs more than ten times a row.
        if self.process != os.getpid():
            self._forget()
        shard, row = self._find(item)
        if shard not in self.opened:
            file = safe_open(self.files[shard], "pt")
            self.opened[shard] = (file.get_slice(LATENTS), file.get_slice(MIRRORED))
        return self.opened[shard][item // len(self)][row]

    def _find(self, item: int) -> tuple[int, int]:
        image = item % len(self)
        shard = bisect_right(self.ends, image)
        return shard, image - (self.ends[shard - 1] if shard else 0)


def _read_head(file: Path) -> tuple[tuple[int, ...], Int[Tensor, " n"]]:
    """Return the shape of one latent and all labels of a file, after checks of all that its header says."""
    try:
        content = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file, cut short perhaps: {error}") from error
    missing = [key for key in KEYS if key not in content.keys()]  # noqa: SIM118 - it is no dictionary
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


def _check_labels(file: Path, labels: Int[Tensor, " n"], num_classes: int | None) -> None:
    bad = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if bad.any():
        row = int(bad.nonzero()[0])
        limit = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        raise ValueError(f"{file}: row {row} of labels is {labels[row]}: expected {limit}")


@dataclass(frozen=True)
class Provenance:
    """Where a folder of latents comes from: what its encoder writes beside the shards as cache.json.

    Args:
        vae: name or hash of the VAE that encoded the images, and must decode what is drawn.
        scaling: the `latent_norm` and `latent_multiplier` that training uses.
        shape: [c, h, w] of a latent.
        num_images: rows of all shards together.
        num_classes: labels are below it.
        checksums: SHA-256 by file name: of latents_stats.pt, and of shards if wanted.
        encoding: what else decides the latents: size of the images, their names, posterior and seed.
    """

    vae: str
    scaling: dict[str, bool | float]
    shape: list[int]
    num_images: int
    num_classes: int
    checksums: dict[str, str]
    encoding: dict[str, str | int] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> "Provenance | None":
        """Return a folder's record, None if it has none.

        Raises:
            ValueError: if it is no JSON, lacks an entry, or is still to come.
        """
        file = Path(folder) / RECORD
        if not file.is_file():
            if (file.parent / MANIFEST).is_dir():
                raise ValueError(f"the latents in {folder} are not complete: run decm encode again, and it goes on")
            return None
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from error
        names = [field.name for field in fields(cls) if field.default is MISSING]
        missing = [name for name in names if name not in content] if isinstance(content, dict) else names
        if missing:
            raise ValueError(f"{file} lacks {', '.join(missing)}")
        if not isinstance(content["checksums"], dict):
            raise ValueError(f"{file}: checksums must be SHA-256 by file name: got {content['checksums']!r}")
        return cls(**{name: content[name] for name in names}, encoding=content.get("encoding"))

    def write(self, folder: str | Path) -> None:
        """Write the record into a folder."""
        content = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(Path(folder) / RECORD, lambda part: part.write_text(content))

    def check(self, shards: Shards, scaling: dict[str, bool | float]) -> None:
        """Refuse shards or a scaling that are not those of the record.

        Raises:
            FileNotFoundError: if a file of the checksums is not there.
            ValueError: naming what differs.
        """
        found = {
            "shape": list(shards.shape),
            "num_images": len(shards),
            "num_classes": shards.num_classes,
            "scaling": scaling,
        }
        for name, value in found.items():
            recorded = getattr(self, name)
            if recorded != value:
                raise ValueError(f"{shards.folder / RECORD} says that {name} is {recorded}: got {value}")
        for name in self.checksums:
            if not (shards.folder / name).is_file():
                raise FileNotFoundError(f"no file {shards.folder / name}, which {RECORD} names")

    def check_file(self, file: Path) -> None:
        """Refuse a file that has changed since the record was written; one that the record does not name passes.

        Raises:
            ValueError: naming the file.
        """
        if file.name in self.checksums and self.checksums[file.name] != checksum(file):
            raise ValueError(f"{file} is not the one that {RECORD} names: its SHA-256 is {checksum(file)}")


def checksum(file: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed or the machine stops.

    Args:
        file: where it will be.
        write: writes it under the name that it is given.
    """
    part = file.with_name(f"{file.name}.part")
    part.touch()
    mode = part.stat().st_mode
    write(part)
    # safetensors lets the owner alone read what it writes: a folder of latents is for a whole lab.
    part.chmod(mode)
    with part.open("rb") as content:
        os.fsync(content.fileno())
    os.replace(part, file)
