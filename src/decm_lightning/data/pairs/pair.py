"""A text-image pair, an error in one, and the names of the columns that hold captions and image files."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decm_lightning.image_reader import suffixes

FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")
LINE = re.compile(r" of line \d+")
NAMED = 3
"""Errors that are named in a message; all are counted."""
LISTED = 400
"""Column names in a message are cut to this number of characters."""
IMAGES = tuple(sorted(suffixes()))
OTHER_IMAGES = (".eps", ".heic", ".heif", ".jxl", ".svg")
"""Suffixes of images that cannot be read. They are counted as errors where a caption is missing."""


@dataclass(frozen=True)
class FileStamp:
    """Name, size in bytes and modification time in ns of a file; both are -1 if there is no such file."""

    name: str
    size: int
    modified: int


@dataclass(frozen=True)
class Pair:
    """An image file's bytes with its caption.

    Attributes:
        place: the file, and the row or member in it, for messages.
        name: what tells the pair from all others of its source.
        image: the bytes of an image file.
        caption: as it is written.
        stamp: the image's own file, if the source only names it.
    """

    place: str
    name: str
    image: bytes
    caption: str
    stamp: FileStamp | None = None


@dataclass(frozen=True)
class DataError:
    """What is wrong, and in which file, row or member.

    Attributes:
        place: the file, and the row or member in it.
        what: the kind of error, in the same words for all errors of a kind, then details in brackets.
        count: pairs that are lost; None if their number is unknown.
        columns: the columns that exist, if the error is that a column does not.
        stamp: the image's own file, if the source only names it.
    """

    place: str
    what: str
    count: int | None = 1
    columns: tuple[str, ...] = ()
    stamp: FileStamp | None = None

    def __str__(self) -> str:
        # The name of a file or member need not be UTF-8.
        return f"{self.place}: {self.what}".encode(errors="backslashreplace").decode()

    @property
    def kind(self) -> str:
        """What is wrong without the details."""
        return LINE.sub("", self.what.partition(" (")[0])


def caption_of(place: str, values: Mapping[str, Any], column: str | None) -> str | DataError:
    """Return the caption of a row: of `column`, or the first of caption, text and prompt that is not empty."""
    names = CAPTION_COLUMNS if column is None else (column,)
    found = {name: values[name] for name in names if name in values}
    if not found:
        return missing_column(place, values, column)
    filled = {name: value for name, value in found.items() if not _is_blank(value)}
    if not filled:
        return DataError(place, f"its caption is empty (column {', '.join(found)})")
    value = next(iter(filled.values()))
    return value if isinstance(value, str) else DataError(place, f"its caption is not text ({value!r:.40})")


def missing_column(place: str, columns: Any, column: str | None, count: int = 1) -> DataError:
    """Return the error of rows without the requested caption column, or without any of the usual names."""
    columns = tuple(str(name) for name in columns)
    expected = " or ".join(CAPTION_COLUMNS) if column is None else repr(column)
    return DataError(place, f"has no caption column (expected {expected}, found {listed(columns)})", count, columns)


def summary(source: str | Path, good: int, errors: Sequence[DataError]) -> str:
    """Return one line that counts all errors by their kind and names the first ones."""
    bad = sum(error.count or 0 for error in errors)
    counts: Counter[str] = Counter()
    for error in errors:
        counts[error.kind] += error.count or 0
    unknown = Counter(error.kind for error in errors if error.count is None)
    kinds = [f"{number} x {kind}" for kind, number in counts.most_common() if number]
    kinds += [f"an unknown number in {number} x {kind}" for kind, number in unknown.items()]
    named = "; ".join(map(str, errors[:NAMED])) + (" ..." if len(errors) > NAMED else "")
    more = ", and an unknown number of pairs could not be read" if unknown else ""
    return f"{bad} of {good + bad} pairs of {source} are bad{more}: {named} ({', '.join(kinds)})"


def no_caption_column(source: str | Path, errors: Sequence[DataError], column: str | None) -> str | None:
    """Return one line that says that no file of a source has the caption column; None if the errors are others."""
    found = dict.fromkeys(name for error in errors for name in error.columns)
    if not any(error.columns for error in errors):
        return None
    expected = " or ".join(CAPTION_COLUMNS) if column is None else repr(column)
    return f"{source} has no caption column {expected}: its columns are {listed(found)}"


def listed(columns: Any) -> str:
    """Return column names for a message."""
    text = ", ".join(map(str, columns)) or "none"
    return text if len(text) <= LISTED else f"{text[:LISTED]}..."


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
