"""Read the images of a source once, crop them, and store their pixels on disk."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from decm_lightning.caches import make_once, remove_abandoned
from decm_lightning.data.images.image_files import center_crop
from decm_lightning.data.images.sources import ImageSource
from decm_lightning.files import PARTIAL, atomic, text_sha256, write_json
from decm_lightning.image_reader import in_threads, read_image
from decm_lightning.progress import Progress

VERSION = 1
"""Increase this when the same images would give other pixels or errors."""
PIXELS, INDEX = "pixels.bin", "index.json"


@dataclass(frozen=True)
class PreparedImages:
    """All good images of a source in its order, and the errors of the others.

    Attributes:
        images: (n, c, size, size), memory-mapped. The pixels of small sets therefore stay in memory.
        labels: (n,).
        hashes: SHA-256 of the content of each file.
        names: name of each image.
        errors: errors by name.
        folder: folder of the stored files.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    hashes: list[str]
    names: list[str]
    errors: dict[str, str]
    folder: Path


class _Read(NamedTuple):
    """A cropped image, and the hash of its file."""

    pixels: UInt8[np.ndarray, "c h w"]
    hash: str


def prepare_images(source: ImageSource, cache: Path, size: int, channels: int | None) -> PreparedImages:
    """Read and crop the images of a source, and store them in `cache`. Later calls return the stored images.

    Args:
        source: the images.
        cache: folder of all stored images, created if it is missing.
        size: the shorter side is resized to this number of pixels, and the center is cropped.
        channels: 1 for gray, 3 for RGB; None for the channels of the images, which must then be equal.

    Raises:
        ValueError: if channels is None and some images are gray and others are not, or the stored files are damaged.
    """
    settings = json.dumps([VERSION, source.identity, size, channels])
    folder = cache / f"images-{text_sha256(settings)[:32]}"

    def make() -> None:
        remove_abandoned(cache, "images-*")
        _write(folder, source, size, channels)

    make_once(folder, make)
    return _load(folder)


def _write(folder: Path, source: ImageSource, size: int, channels: int | None) -> None:
    # A process that is killed must not leave a folder that looks complete.
    partial_folder = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir()
    good: list[tuple[str, int, str]] = []
    errors: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    try:
        with atomic(partial_folder / PIXELS) as file, file.open("wb") as content:
            for number, image in enumerate(_images(source, size, channels)):
                if isinstance(image, str):
                    errors[source.names[number]] = image
                    continue
                shape = shape or image.pixels.shape
                if image.pixels.shape != shape:
                    raise _mixed(good[0][0], source.names[number], shape[0] == 1)
                content.write(image.pixels.tobytes())
                good.append((source.names[number], source.labels[number], image.hash))
        names, labels, hashes = map(list, zip(*good, strict=True)) if good else ([], [], [])
        index = {"names": names, "labels": labels, "hashes": hashes, "errors": errors, "shape": list(shape)}
        write_json(partial_folder / INDEX, index)
        partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _images(source: ImageSource, size: int, channels: int | None) -> Iterator[_Read | str]:
    read = in_threads(partial(_read, source, size, channels), range(len(source.names)))
    return Progress(read, desc="reading images", total=len(source.names), unit="image")


def _read(source: ImageSource, size: int, channels: int | None, number: int) -> _Read | str:
    """Return an image, or its error."""
    try:
        if source.labels[number] < 0:
            return "has no label"
        content = source.read(number)
        image = read_image(content)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)
    if min(image.size) < size:
        return f"is smaller than size {size} ({image.width} x {image.height} pixels)"
    mode = {1: "L", 3: "RGB", None: image.mode}[channels]
    pixels = np.atleast_3d(center_crop(image.convert(mode), size)).transpose(2, 0, 1)
    return _Read(pixels, hashlib.sha256(content).hexdigest())


def _mixed(first: str, other: str, first_is_gray: bool) -> ValueError:
    gray, color = (first, other) if first_is_gray else (other, first)
    return ValueError(f"{gray} is gray and {color} is in color: set channels to 3, or to 1 to read all as gray")


def _load(folder: Path) -> PreparedImages:
    remedy = "delete the folder, and run again"
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names, labels, hashes, errors, shape = (index[k] for k in ("names", "labels", "hashes", "errors", "shape"))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the stored images in {folder} are damaged ({INDEX}: {error!r}): {remedy}") from error
    file, count = folder / PIXELS, len(names) * math.prod(shape)
    if (found := file.stat().st_size if file.is_file() else 0) != count:
        raise ValueError(
            f"the stored images in {folder} are damaged ({PIXELS} has {found} bytes, expected {count}): {remedy}"
        )
    # An empty file cannot be mapped.
    mapped = torch.from_file(str(file), size=count, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    return PreparedImages(
        mapped.view(len(names), *shape), torch.tensor(labels, dtype=torch.long), hashes, names, errors, folder
    )
