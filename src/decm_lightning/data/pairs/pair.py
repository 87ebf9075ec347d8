"""Text-image pairs and their errors, and their construction from the rows of any source."""

import os
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
"""Maximum number of errors that a message names; all are counted."""
LISTED = 400
"""Maximum number of characters of column names in a message."""
IMAGES = tuple(sorted(suffixes()))
OTHER_IMAGES = (".eps", ".heic", ".heif", ".jxl", ".svg")
"""Suffixes of unsupported image formats. A list must have a row for these images, too."""


@dataclass(frozen=True)
class FileStamp:
    """Name, size in bytes and modification time in ns of a file. Both numbers are -1 if the file does not exist."""

    name: str
    size: int
    modified: int


@dataclass(frozen=True)
class Pair:
    """An image file's bytes with its caption as written.

    `place` is the file, and the row or member in it, for messages; `name` is unique in the source. `stamp` is that of
    the image file, if the source only names the file.
    """

    place: str
    name: str
    image: bytes
    caption: str
    stamp: FileStamp | None = None


@dataclass(frozen=True)
class DataError:
    """An error in the data, with its place.

    Attributes:
        place: the file, and the row or member in it.
        what: the error: the same words for all errors of a kind, followed by details in parentheses.
        count: number of pairs that are lost; None if it is unknown.
        stamp: stamp of the image file, if the source only names the file.

    Example:
        >>> error = DataError("a.csv: line 3", "its caption is too long (2100 characters)")
        >>> print(error)
        a.csv: line 3: its caption is too long (2100 characters)
        >>> error.kind
        'its caption is too long'
    """

    place: str
    what: str
    count: int | None = 1
    stamp: FileStamp | None = None

    def __str__(self) -> str:
        # The name of a file or member may not be UTF-8.
        return f"{self.place}: {self.what}".encode(errors="backslashreplace").decode()

    @property
    def kind(self) -> str:
        """The error without details."""
        return LINE.sub("", self.what.partition(" (")[0])


def pair_of(
    place: str, values: Mapping[str, Any], folder: Path, column: str | None, name: str = "", error: str | None = None
) -> Pair | DataError:
    """Return the pair in a row of a list, table or data set, or the error of the row.

    An image is {"bytes", "path"}, bytes, or the name of a file relative to `folder`. Bytes in any column take
    precedence over names. The caption is in `column`, or else the first of caption, text and prompt that is not empty.
    The pair is named after its file by default. With an `error`, the row could not be read.
    """
    image, path = image_of(values)
    if image is None and path:
        place = f"{place}, {path:.200}"
    if error:
        return DataError(place, error)
    if image is None and not path:
        return DataError(place, f"has no image (bytes, or the name of a file, in {', '.join(FILE_COLUMNS)})")
    caption = caption_of(place, values, column)
    if isinstance(caption, DataError):
        return caption
    if image is not None:
        return Pair(place, name or path, image, caption)
    # The stamp comes first, so that a file that is replaced while it is read counts as changed.
    stamp = stamp_of(folder / path)
    try:
        return Pair(place, name or path, (folder / path).read_bytes(), caption, stamp)
    except (OSError, ValueError) as failure:
        reason = failure.strerror if isinstance(failure, OSError) else failure
        return DataError(place, f"its image cannot be read ({reason})", stamp=stamp)


def image_of(values: Mapping[str, Any]) -> tuple[bytes | None, str]:
    """Return the bytes of the image in a row, or None, and the name of its file, or ""."""
    content, path = None, ""
    for name in FILE_COLUMNS:
        image: Any = values.get(name)
        named = image
        if isinstance(image, dict):
            image, named = image.get("bytes"), image.get("path")
            named = named.decode() if isinstance(named, bytes) else named
        content = image if content is None and isinstance(image, bytes) else content
        path = path or (named.strip() if isinstance(named, str) else "")
    return content, path


def stamp_of(path: Path | str) -> FileStamp:
    """Return the stamp of a file. Links are followed."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return FileStamp(str(path), -1, -1)
    return FileStamp(str(path), found.st_size, found.st_mtime_ns)


def caption_of(place: str, values: Any, column: str | None) -> str | DataError:
    """Return the caption of a row, from `column` or the first of caption, text and prompt that is not empty."""
    if not isinstance(values, Mapping):
        return DataError(place, "is not a JSON object")
    found = {name: values[name] for name in caption_columns(column) if name in values}
    if not found:
        return missing_column(place, values, column)
    filled = [value for value in found.values() if value is not None and (not isinstance(value, str) or value.strip())]
    if not filled:
        return DataError(place, f"its caption is empty (column {', '.join(found)})")
    return filled[0] if isinstance(filled[0], str) else DataError(place, f"its caption is not text ({filled[0]!r:.40})")


def missing_column(place: str, columns: Any, column: str | None, count: int | None = 1) -> DataError:
    """Return the error of rows without the requested caption column, or without any of the default columns."""
    expected = " or ".join(CAPTION_COLUMNS) if column is None else repr(column)
    return DataError(place, f"has no caption column (expected {expected}, found {listed(columns)})", count)


def summary(source: str | Path, good: int, errors: Sequence[DataError]) -> str:
    """Return one line with the number of errors by kind and the first errors."""
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


def listed(columns: Any) -> str:
    """Return column names as text for a message."""
    text = ", ".join(map(str, columns)) or "none"
    return text if len(text) <= LISTED else f"{text[:LISTED]}..."


def caption_columns(column: str | None) -> tuple[str, ...]:
    """Return the columns that may hold the caption."""
    return CAPTION_COLUMNS if column is None else (column,)


def first_line(error: Exception) -> str:
    """Return an error's first line, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
