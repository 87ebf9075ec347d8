"""Folders of cropped pixels and their index: written once as a whole, and mapped into memory."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from decm_lightning.files import atomic, atomic_folder, write_json

PIXELS = "pixels.bin"


@dataclass(frozen=True)
class StoredPixels:
    """Images (n, c, size, size), memory-mapped, with their unique names, and the folder that stores them."""

    images: UInt8[Tensor, "n c h w"]
    names: list[str]
    folder: Path


@contextmanager
def written(folder: Path) -> Iterator[tuple[IO[bytes], dict[str, Any]]]:
    """Write a folder as a whole: the block writes pixels into a stream, and adds the content of JSON files by name.

    A process that is killed leaves a folder whose name ends in .partial. An existing folder is replaced.
    """
    files: dict[str, Any] = {}
    with atomic_folder(folder) as partial:
        with atomic(partial / PIXELS) as file, file.open("wb") as pixels:
            yield pixels, files
        for name, content in files.items():
            write_json(partial / name, content)


@contextmanager
def content_of(file: Path) -> Iterator[Any]:
    """Yield the content of a JSON file. Errors of the block, and a missing file, are reported as damage."""
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise _damaged(file.parent, f"{file.name}: {error!r}") from error


def map_pixels(folder: Path, *shape: int) -> UInt8[Tensor, "n c h w"]:
    """Return the pixels of a folder, memory-mapped. Those of small sets therefore stay in memory."""
    file, count = folder / PIXELS, math.prod(shape)
    if (found := file.stat().st_size if file.is_file() else 0) != count:
        raise _damaged(folder, f"{PIXELS} has {found} bytes, expected {count}")
    # An empty file cannot be mapped.
    mapped = torch.from_file(str(file), size=count, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    return mapped.view(shape)


def _damaged(folder: Path, reason: str) -> ValueError:
    return ValueError(f"the stored images in {folder} are damaged ({reason}): delete the folder, and run again")
