"""Folders of latents in LightningDiT's format: safetensors shards read row by row, and the record of their origin."""

import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from decm_lightning.data.latents.shard_files import (
    KEYS,
    LATENTS,
    MIRRORED,
    check_labels,
    find_files,
    open_file,
    read_head,
)
from decm_lightning.files import atomic, describe_unreadable, file_sha256

BFLOAT16 = np.uint16
BLOCK = 64
RECORD = "cache.json"
MANIFEST = "manifest"


class Shards:
    """The rows of all `*.safetensors` files of a folder, in the order of their names; no file is ever loaded whole.

    A file holds `latents` (n, c, h, w), `latents_flip`, the same of the mirrored images, and `labels` (n,). Opening
    reads headers and labels only. Of N images in all, item i is image i, and item N + i is image i mirrored.

    Args:
        folder: where the files are; hidden and unfinished ones are skipped, and counted in `skipped`.
        num_classes: labels must be below it; None for one more than the largest label.
        report: receives the kind of each fault and the fault, which is raised without it. Files that cannot be used are
            then left out; one with wrong labels is not.

    Raises:
        FileNotFoundError: if there is no such folder, or no file in it.
        ValueError: naming the file, if one cannot be read, is empty, lacks a key, has a shape or type that does not
            fit, or has a label outside of [0, num_classes), naming its row, too; if no file is left.
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
                    raise ValueError(f"{file}: latents are {shape}, but {self.shape} in {self.files[0].name}")
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
        """Return the latents of the items as they are on the disk, in float32."""
        mirrored, images = np.divmod(np.asarray(items), len(self))
        shards = np.searchsorted(self.ends, images, side="right")
        rows = images - np.asarray([0, *self.ends])[shards]
        numbers = (2 * shards + mirrored).tolist()
        arrays = {number: self._map(number) for number in set(numbers)}
        bfloat16 = {number for number, array in arrays.items() if array.dtype == BFLOAT16}
        # numpy asks for huge pages, which torch does not: a batch costs fewer page faults.
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
        """Return where an item is: 0 for latents or 1 for latents_flip, the number of the file, and the row in it."""
        mirrored, image = divmod(item, len(self))
        shard = bisect_right(self.ends, image)
        return mirrored, shard, image - (self.ends[shard - 1] if shard else 0)

    def place(self, item: int) -> str:
        """Return where an item is, in words."""
        mirrored, shard, row = self.find(item)
        return f"{self.files[shard]}: row {row} of {KEYS[mirrored]}"

    def blocks(self) -> list[range]:
        """Return all items, in ranges of at most 64."""
        return [range(start, min(start + BLOCK, 2 * len(self))) for start in range(0, 2 * len(self), BLOCK)]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mapped": {}}  # a pickle would hold whole files

    def _map(self, number: int) -> np.ndarray:
        """Return latents (even numbers) or latents_flip (odd) of a file, mapped into memory."""
        # Mapped when it is first read, and kept: mapping costs more than ten times a row.
        if number not in self.mapped:
            tensor = open_file(self.files[number // 2]).get_tensor((LATENTS, MIRRORED)[number % 2])
            # numpy has no bfloat16, whose bits are the upper half of a float32's.
            self.mapped[number] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return self.mapped[number]


def _raise(kind: str, error: ValueError) -> None:
    raise error


@dataclass(frozen=True)
class Provenance:
    """Where a folder of latents comes from: what its encoder writes next to the shards as cache.json.

    Args:
        vae: name or hash of the VAE that encoded the images, and must decode samples.
        scaling: the `latent_norm` and `latent_multiplier` that training uses.
        shape: [c, h, w] of a latent.
        num_images: rows of all shards together.
        num_classes: labels are below it.
        checksums: SHA-256 by file name: of latents_stats.pt, and, optionally, of shards.
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
        """Return a folder's record, None if it has none. Entries that it does not know are left alone.

        Raises:
            ValueError: naming the file and the entries, if it cannot be read, is not JSON, lacks entries or has some of
                another type, or is still to come.
        """
        file = Path(folder) / RECORD
        if not os.path.lexists(file):
            if (file.parent / MANIFEST).is_dir():
                raise ValueError(f"the latents in {folder} are not complete: run decm encode again to resume")
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {describe_unreadable(file, text=True) or f'not JSON: {error}'}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} must hold an object with {', '.join(ENTRIES)}: got {_short(content)}")
        if missing := [name for name in ENTRIES if name not in content and name != "encoding"]:
            raise ValueError(f"{file} lacks {', '.join(missing)}")
        wrong = [
            f"{name} must be {expected}: got {_short(content[name])}"
            for name, (fits, expected) in ENTRIES.items()
            if not fits(content.get(name))
        ]
        if wrong:
            raise ValueError(f"{file}: {'; '.join(wrong)}")
        known: dict[str, Any] = {name: content.get(name) for name in ENTRIES}
        return cls(**known)

    def write(self, folder: str | Path) -> None:
        """Write the record into a folder."""
        with atomic(Path(folder) / RECORD) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check(self, shards: Shards, scaling: dict[str, bool | float]) -> None:
        """Refuse shards or a scaling that are not those of the record.

        Raises:
            ValueError: naming the first thing that differs, or is missing.
        """
        if faults := self.faults(shards, scaling):
            raise ValueError(faults[0])

    def faults(self, shards: Shards, scaling: dict[str, bool | float]) -> list[str]:
        """Describe everything that differs from the record, or is missing."""
        found = {
            "shape": list(shards.shape),
            "num_images": len(shards),
            "num_classes": shards.num_classes,
            "scaling": scaling,
        }
        recorded = {name: getattr(self, name) for name in found}
        recorded["scaling"] = {name: self.scaling[name] for name in scaling}
        if shards.left_out:
            del found["num_images"]
        file = shards.folder / RECORD
        differing = [name for name in found if found[name] != recorded[name]]
        missing = [shards.folder / name for name in self.checksums if not (shards.folder / name).is_file()]
        return [
            *(f"{file} says that {name} is {recorded[name]}: got {found[name]}" for name in differing),
            *(f"no file {path}, which {RECORD} names" for path in missing),
        ]

    def check_file(self, file: Path) -> None:
        """Refuse a file that has changed since the record was written; one that the record does not name passes.

        Raises:
            ValueError: naming the file.
        """
        recorded = self.checksums.get(file.name)
        if recorded is not None and recorded != (found := file_sha256(file)):
            raise ValueError(f"{file} is not the one that {RECORD} names: its SHA-256 is {found}")

    def check_vae(self, folder: str | Path, vae: str, identity: str) -> None:
        """Refuse a VAE that did not encode the images.

        Args:
            folder: of the latents.
            vae: the name that the user knows it by.
            identity: its `Autoencoder.identity`.

        Raises:
            ValueError: naming both.
        """
        if self.vae != identity:
            raise ValueError(
                f"{Path(folder) / RECORD} says that {self.vae} encoded these latents: {vae} is {identity}, which would "
                "decode them wrongly"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_scaling(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("latent_norm"), bool):
        return False
    multiplier = value.get("latent_multiplier")
    return isinstance(multiplier, int | float) and not isinstance(multiplier, bool) and 0 < multiplier < math.inf


def _is_checksums(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


ENTRIES: dict[str, tuple[Callable[[object], bool], str]] = {
    "vae": (lambda value: isinstance(value, str), "a string"),
    "scaling": (_is_scaling, "latent_norm (true or false) and latent_multiplier (a number above 0)"),
    "shape": (
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_count, value)),
        "[channels, height, width], integers above 0",
    ),
    "num_images": (_is_count, "an integer above 0"),
    "num_classes": (_is_count, "an integer above 0"),
    "checksums": (_is_checksums, "SHA-256 by file name"),
    "encoding": (lambda value: value is None or isinstance(value, dict), "an object or null"),
}
"""The entries of cache.json: whether a value fits, and what is expected."""


def _short(value: object) -> str:
    """Return a value as JSON, at most 60 characters of it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
