"""Pairs read and checked once: pixels in one file on the disk, captions and faults beside it."""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock, Timeout
from jaxtyping import UInt8
from torch import Tensor
from tqdm.auto import tqdm

from decm_lightning.data.pairs_sources import Fault, Pair, files_of, named_in, read_csv
from decm_lightning.image_reader import pixels_of

# Letters that show nothing: control characters, zero-width ones such as a byte order mark, and spaces.
BLANK = {"Cc", "Cf", "Zs"}
SURROGATE = re.compile("[\ud800-\udfff]")
Pixels = UInt8[Tensor, "n c h w"]


@dataclass(frozen=True)
class Prepared:
    """All good pairs of a source, in its order, and what was wrong with the others.

    Attributes:
        images: mapped into memory from the disk, (n, 3, size, size).
        captions: one for each image.
        names: what tells an image from all others.
        faults: what was left out.
        folder: where all this is kept.
    """

    images: Pixels
    captions: list[str]
    names: list[str]
    faults: list[Fault]
    folder: Path


def prepare(source: Path, cache: Path, size: int, column: str | None, max_characters: int) -> Prepared:
    """Return a source's pairs: as they were prepared before, or read, checked, cropped and kept in `cache` now.

    What is kept is used again as long as name, size and time of every file of the source are the same, and of every
    image that its CSV file names. A pixel takes three bytes: 100,000 images of 256 x 256 take 20 GB. Of two processes
    that prepare the same at once, the second waits for the first; what killed ones have left is removed.

    Args:
        source: a file or folder, see `pairs_sources`.
        cache: a folder, made if need be.
        size: images are cropped to a square about their centre and resized to so many pixels.
        column: the name of the caption in JSON files and tables; None for caption, text or prompt.
        max_characters: longer captions are faults.

    Raises:
        FileNotFoundError: if there is no such source.
    """
    files, read = files_of(source)
    everything = set(source.rglob("*") if source.is_dir() else files)
    if read is read_csv:
        everything |= named_in(files[0])
    # Path.is_file refuses names that are too long.
    present = sorted(path for path in everything if os.path.isfile(path))
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in present]
    key = hashlib.sha256(json.dumps([stats, size, column, max_characters]).encode()).hexdigest()[:32]
    folder = cache / f"pairs-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        for stale in cache.glob("pairs-*.partial"):
            # Whoever still writes it holds its lock.
            with suppress(Timeout), FileLock(stale.with_suffix(".lock"), blocking=False):
                shutil.rmtree(stale, ignore_errors=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _write(folder, chain.from_iterable(read(file, column) for file in files), size, max_characters)
    return _load(folder, size)


def _write(folder: Path, pairs: Iterable[Pair | Fault], size: int, max_characters: int) -> None:
    # Another name until it is whole: a process that is stopped leaves no folder that looks finished.
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    try:
        with (partial / "pixels.bin").open("wb") as pixels, tqdm(desc="reading pairs", unit="pair") as bar:
            content = _Writer(pixels, size, max_characters)
            for pair in pairs:
                content.add(pair)
                bar.update()
        (partial / "pairs.json").write_text(json.dumps(content.record()))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    """Takes in pairs and faults one by one, and finds the faults of images and captions."""

    def __init__(self, pixels: IO[bytes], size: int, max_characters: int) -> None:
        self.pixels = pixels
        self.size = size
        self.max_characters = max_characters
        self.captions: list[str] = []
        self.names: list[str] = []
        self.faults: list[Fault] = []

    def add(self, pair: Pair | Fault) -> None:
        if isinstance(pair, Fault):
            self.faults.append(pair)
            return
        try:
            if SURROGATE.search(pair.name):
                raise ValueError("its name is not UTF-8")
            caption = self.checked(pair.caption)
            image = pixels_of(pair.image, self.size)
        except ValueError as error:
            self.faults.append(Fault(pair.place, str(error)))
            return
        self.pixels.write(image.contiguous().numpy().tobytes())
        self.captions.append(caption)
        self.names.append(pair.name)

    def checked(self, caption: str) -> str:
        caption = " ".join(caption.split())
        if all(unicodedata.category(letter) in BLANK for letter in caption):
            raise ValueError("its caption is empty")
        if found := SURROGATE.search(caption):
            raise ValueError(f"its caption has half a character ({found[0]!r})")
        if len(caption) > self.max_characters:
            count = f"{len(caption)} characters, and max_characters is {self.max_characters}"
            raise ValueError(f"its caption is too long ({count})")
        return caption

    def record(self) -> dict[str, list]:
        faults = [asdict(fault) for fault in self.faults]
        return {"captions": self.captions, "names": self.names, "faults": faults}


def _load(folder: Path, size: int) -> Prepared:
    record = json.loads((folder / "pairs.json").read_text())
    count = len(record["captions"])
    shape = (count, 3, size, size)
    file = str(folder / "pixels.bin")
    # A file of no bytes cannot be mapped.
    mapped = torch.from_file(file, size=3 * count * size**2, dtype=torch.uint8) if count else torch.empty(0)
    faults = [Fault(**fault) for fault in record["faults"]]
    return Prepared(mapped.view(shape).to(torch.uint8), record["captions"], record["names"], faults, folder)
