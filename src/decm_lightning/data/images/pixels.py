"""Read the images of a source once, crop them, and store their pixels on disk."""

import hashlib
import json
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
from decm_lightning.data.stored_pixels import StoredPixels, content_of, map_pixels, written
from decm_lightning.files import text_sha256
from decm_lightning.image_reader import in_threads, read_image
from decm_lightning.progress import Progress

VERSION = 1
"""Increase this when the same images would give other pixels or errors."""
INDEX = "index.json"


@dataclass(frozen=True)
class PreparedImages(StoredPixels):
    """All good images of a source with label and SHA-256 of each file, and the errors of the others by name."""

    labels: Int[Tensor, " n"]
    hashes: list[str]
    errors: dict[str, str]


class _Read(NamedTuple):
    """A cropped image, and the hash of its file."""

    pixels: UInt8[np.ndarray, "c h w"]
    hash: str


def prepare_images(source: ImageSource, cache: Path, size: int, channels: int | None) -> PreparedImages:
    """Read and crop the images of a source, and store them in `cache`. Later calls return the stored images.

    The shorter side is resized to `size`, and the center is cropped. Without `channels`, all images must be gray, or
    all in color.
    """
    settings = json.dumps([VERSION, source.identity, size, channels])
    folder = cache / f"images-{text_sha256(settings)[:32]}"

    def make() -> None:
        remove_abandoned(cache, "images-*")
        _write(folder, source, size, channels)

    make_once(folder, make)
    return _load(folder)


def _write(folder: Path, source: ImageSource, size: int, channels: int | None) -> None:
    good: list[tuple[str, int, str]] = []
    errors: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    read = in_threads(partial(_read, source, size, channels), range(len(source.names)))
    with written(folder) as (pixels, files):
        for number, image in enumerate(Progress(read, desc="reading images", total=len(source.names), unit="image")):
            if isinstance(image, str):
                errors[source.names[number]] = image
                continue
            shape = shape or image.pixels.shape
            if image.pixels.shape != shape:
                raise _mixed(good[0][0], source.names[number], shape[0] == 1)
            pixels.write(image.pixels.tobytes())
            good.append((source.names[number], source.labels[number], image.hash))
        names, labels, hashes = map(list, zip(*good, strict=True)) if good else ([], [], [])
        files[INDEX] = {"names": names, "labels": labels, "hashes": hashes, "errors": errors, "shape": list(shape)}


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
    with content_of(folder / INDEX) as index:
        names, labels, hashes, errors, shape = (index[k] for k in ("names", "labels", "hashes", "errors", "shape"))
    images = map_pixels(folder, len(names), *shape)
    return PreparedImages(images, names, folder, torch.tensor(labels, dtype=torch.long), hashes, errors)
