"""Read and check pairs once, and store pixels, captions and errors on disk."""

import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from decm_lightning.caches import make_once, remove_abandoned
from decm_lightning.data.pairs.pair import DataError, FileStamp, Pair, stamp_of
from decm_lightning.data.pairs.sources import find_pairs
from decm_lightning.files import PARTIAL, atomic, text_sha256, write_json
from decm_lightning.image_reader import pixels_of
from decm_lightning.progress import Progress

# Unicode categories of invisible characters: control and zero-width characters, and spaces.
BLANK = {"Cc", "Cf", "Zs"}
SURROGATE = re.compile("[\ud800-\udfff]")
VERSION = 2
"""Increase this when the same files would give other pixels, captions or errors."""
STAMPS = "stamps.json"
"""File with the names, sizes and times of the image files that the source names."""
Pixels = UInt8[Tensor, "n c h w"]


@dataclass(frozen=True)
class PreparedPairs:
    """All good pairs of a source in its order, and the errors of the others.

    Attributes:
        images: (n, 3, size, size), memory-mapped.
        captions: one caption for each image.
        names: unique name of each image.
        errors: errors of the pairs that were left out.
        unread: number of files of the source that are not read, by kind.
        folder: folder of the stored files.
    """

    images: Pixels
    captions: list[str]
    names: list[str]
    errors: list[DataError]
    unread: Counter[str]
    folder: Path


def prepare(
    source: Path, cache: Path, size: int, column: str | None, max_characters: int, split: str | None = None
) -> PreparedPairs:
    """Read, check and crop the pairs of a source, and store them in `cache`. Later calls return the stored pairs.

    Pairs are read again if the name, size or time of a file of the source changes, or of an image file that it names.
    Links are followed. A pixel takes three bytes, so 100,000 images of 256 x 256 take 20 GB. A second process that
    prepares the same pairs waits for the first. Partial folders of killed processes are removed.

    Args:
        source: a file, a folder, a pattern or a name; see `find_pairs`.
        cache: folder of the stored pairs, created if it is missing.
        size: images are center-cropped to a square and resized to this number of pixels.
        column: name of the caption in JSON files and tables; None for caption, text or prompt.
        max_characters: longer captions are errors.
        split: split of a data set; see `find_pairs`.

    Raises:
        FileNotFoundError: if the source does not exist.
        ValueError: if the source cannot be read as a whole, or the stored files are damaged.
    """
    found = find_pairs(source, split)
    settings = json.dumps([VERSION, found.identity, size, column, max_characters])
    folder = cache / f"pairs-{text_sha256(settings)[:32]}"

    def make() -> None:
        remove_abandoned(cache, "pairs-*")
        _write(folder, found.rows(column), size, max_characters)

    make_once(folder, make, lambda: folder.is_dir() and _is_current(folder))
    return _load(folder, size, found.unread)


def _write(folder: Path, pairs: Iterable[Pair | DataError], size: int, max_characters: int) -> None:
    # A process that is killed must not leave a folder that looks complete.
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    captions: list[str] = []
    names: list[str] = []
    errors: list[dict[str, Any]] = []
    stamps: list[tuple[str, int, int]] = []
    try:
        with atomic(partial / "pixels.bin") as file, file.open("wb") as pixels:
            for pair in Progress(pairs, desc="reading pairs", unit="pair"):
                if pair.stamp:
                    stamps.append(astuple(pair.stamp))
                if isinstance(pair, DataError):
                    errors.append(asdict(pair))
                    continue
                try:
                    image, caption = _checked(pair, size, max_characters)
                except ValueError as error:
                    errors.append(asdict(DataError(pair.place, str(error))))
                    continue
                pixels.write(image.contiguous().numpy().tobytes())
                captions.append(caption)
                names.append(pair.name)
        write_json(partial / "pairs.json", {"captions": captions, "names": names, "errors": errors})
        write_json(partial / STAMPS, stamps)
        # A former folder exists if an image has changed.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked(pair: Pair, size: int, max_characters: int) -> tuple[Tensor, str]:
    """Return the pixels and the caption of a pair; raise ValueError if either is bad."""
    if SURROGATE.search(pair.name):
        raise ValueError("its name is not UTF-8")
    caption = " ".join(pair.caption.split())
    if all(unicodedata.category(letter) in BLANK for letter in caption):
        raise ValueError("its caption is empty")
    if found := SURROGATE.search(caption):
        raise ValueError(f"its caption has an unpaired surrogate ({found[0]!r})")
    if "\0" in caption:
        raise ValueError("has a NUL byte")
    if len(caption) > max_characters:
        count = f"{len(caption)} characters, but max_characters is {max_characters}"
        raise ValueError(f"its caption is too long ({count})")
    return pixels_of(pair.image, size), caption


def _is_current(folder: Path) -> bool:
    """Return whether all image files that the source names are unchanged."""
    try:
        stamps = [FileStamp(*stamp) for stamp in _read(folder / STAMPS)]
    except TypeError as error:
        raise _damaged(folder, f"{STAMPS}: {error}") from error
    return all(stamp == stamp_of(stamp.name) for stamp in stamps)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(file.parent, f"{file.name}: {error}") from error


def _damaged(folder: Path, reason: object) -> ValueError:
    return ValueError(f"the prepared pairs in {folder} are damaged ({reason}): delete the folder, and run again")


def _load(folder: Path, size: int, unread: Counter[str]) -> PreparedPairs:
    record = _read(folder / "pairs.json")
    try:
        captions, names = record["captions"], record["names"]
        errors = [DataError(**error | {"stamp": None}) for error in record["errors"]]
        assert len(captions) == len(names)
        assert all(isinstance(text, str) for text in chain(captions, names))
    except (AssertionError, KeyError, TypeError) as error:
        raise _damaged(folder, f"pairs.json: {error!r}") from error
    file, count = folder / "pixels.bin", 3 * len(captions) * size**2
    found = file.stat().st_size if file.is_file() else 0
    if found != count:
        raise _damaged(folder, f"pixels.bin has {found} bytes, expected {count}")
    # An empty file cannot be mapped.
    mapped = torch.from_file(str(file), size=count, dtype=torch.uint8) if count else torch.empty(0)
    images = mapped.view(len(captions), 3, size, size).to(torch.uint8)
    return PreparedPairs(images, captions, names, errors, unread, folder)
