"""Read and check pairs once, and store pixels, captions and errors on disk."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from decm_lightning.caches import make_once, remove_abandoned
from decm_lightning.data.pairs.pair import DataError, FileStamp, Pair, stamp_of
from decm_lightning.data.pairs.sources import find_pairs
from decm_lightning.data.stored_pixels import StoredPixels, content_of, map_pixels, written
from decm_lightning.files import text_sha256
from decm_lightning.image_reader import pixels_of
from decm_lightning.progress import Progress

# Unicode categories of invisible characters: control and zero-width characters, and spaces.
BLANK = {"Cc", "Cf", "Zs"}
SURROGATE = re.compile("[\ud800-\udfff]")
VERSION = 2
"""Increase this when the same files would give other pixels, captions or errors."""
INDEX, STAMPS = "pairs.json", "stamps.json"
"""The captions, names and errors; and the names, sizes and times of the image files that the source names."""


@dataclass(frozen=True)
class PreparedPairs(StoredPixels):
    """All good pairs of a source in its order, the errors of the others, and the number of unread files by kind."""

    captions: list[str]
    errors: list[DataError]
    unread: Counter[str]


def prepare(
    source: Path, cache: Path, size: int, column: str | None, max_characters: int, split: str | None = None
) -> PreparedPairs:
    """Read, check and crop the pairs of a source, and store them in `cache`. Later calls return the stored pairs.

    Pairs are read again if the name, size or time of a file of the source changes, or of an image file that it names.
    Links are followed. A pixel takes three bytes, so 100,000 images of 256 x 256 take 20 GB. A second process that
    prepares the same pairs waits for the first. Partial folders of killed processes are removed. For source, column and
    split see `find_pairs` and `pair_of`.
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
    captions: list[str] = []
    names: list[str] = []
    errors: list[dict[str, Any]] = []
    stamps: list[tuple[str, int, int]] = []
    with written(folder) as (pixels, files):
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
        files |= {INDEX: {"captions": captions, "names": names, "errors": errors}, STAMPS: stamps}


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
    with content_of(folder / STAMPS) as content:
        stamps = [FileStamp(*stamp) for stamp in content]
    return all(stamp == stamp_of(stamp.name) for stamp in stamps)


def _load(folder: Path, size: int, unread: Counter[str]) -> PreparedPairs:
    with content_of(folder / INDEX) as index:
        captions, names = index["captions"], index["names"]
        errors = [DataError(**error | {"stamp": None}) for error in index["errors"]]
        assert len(captions) == len(names)
        assert all(isinstance(text, str) for text in chain(captions, names))
    images = map_pixels(folder, len(captions), 3, size, size)
    return PreparedPairs(images, names, folder, captions, errors, unread)
