"""Lists of image files with captions: CSV files with a header, and JSON lines."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from decm_lightning.data.pairs.csv_records import Record, records
from decm_lightning.data.pairs.pair import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    IMAGES,
    OTHER_IMAGES,
    DataError,
    FileStamp,
    Pair,
    caption_of,
    listed,
)
from decm_lightning.image_listing import list_files

DELIMITERS = ",;\t|"
# The byte order marks.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# What errors="surrogateescape" makes of bytes that are not UTF-8.
UNDECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class _Row:
    """A row, the image file that it names, if any, and why the row cannot be read, if so."""

    place: str
    image: str
    values: dict[str, Any]
    error: str | None = None


def read_list(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    """Yield the pairs of a CSV file with a header or of JSON lines, which name image files and their captions.

    The names are relative to the folder of the list. Image files in that folder that no row names are errors, too,
    whatever their format. A CSV file may be separated by commas, semicolons, tabs or bars.

    Raises:
        ValueError: if a CSV file is empty or not in UTF-8, or its header lacks a column or has it twice.
    """
    named = set()
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        for row in _json_rows(file, lines) if file.suffix.lower() == ".jsonl" else _csv_rows(file, lines, column):
            # A name with a NUL byte or half a character is not that of a file.
            with suppress(ValueError):
                if row.image:
                    named.add(os.path.realpath(file.parent / row.image))
            yield _pair(file, row, column)
    for parts in list_files(file.parent, IMAGES + OTHER_IMAGES).files:
        image = file.parent.joinpath(*parts)
        if (real := os.path.realpath(image)) not in named:
            named.add(real)
            yield DataError(str(image), f"has no caption in {file.name}")


def read_image(place: str, path: Path) -> tuple[bytes, FileStamp] | DataError:
    """Return the content and the stamp of an image file that a list or table names."""
    # A file that is replaced while it is read must have the older stamp.
    stamp = stamp_of(path)
    try:
        return path.read_bytes(), stamp
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return DataError(place, f"its image cannot be read ({reason})", stamp=stamp)


def stamp_of(path: Path | str) -> FileStamp:
    """Return name, size and time of a file, through links."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return FileStamp(str(path), -1, -1)
    return FileStamp(str(path), found.st_size, found.st_mtime_ns)


def _pair(file: Path, row: _Row, column: str | None) -> Pair | DataError:
    if row.error:
        return DataError(row.place, row.error)
    if not row.image:
        return DataError(row.place, f"names no image ({' or '.join(FILE_COLUMNS)})")
    caption = caption_of(row.place, row.values, column)
    if isinstance(caption, DataError):
        return caption
    image = read_image(row.place, file.parent / row.image)
    return image if isinstance(image, DataError) else Pair(row.place, row.image, image[0], caption, image[1])


def _csv_rows(file: Path, lines: Iterator[str], column: str | None) -> Iterator[_Row]:
    before = []
    for line in lines:
        before.append(line)
        if line.strip():
            break
    first = before[-1] if before else ""
    if not first.strip():
        raise ValueError(f"{file} is empty")
    if "\0" in first or _starts_as_utf_16(file):
        raise ValueError(f"{file} is not text in UTF-8: save it in UTF-8")
    delimiter = next((mark for mark in DELIMITERS if not {*_names(first.split(mark))}.isdisjoint(FILE_COLUMNS)), ",")
    header: list[str] = []

    def names_an_image(fields: list[str]) -> bool:
        name = _image(dict(zip(header, fields, strict=True)))
        return name.lower().endswith(IMAGES + OTHER_IMAGES) or (bool(name) and os.path.isfile(file.parent / name))

    for record in records(chain(before, lines), delimiter, header, names_an_image):
        if header:
            yield _csv_row(file, record, header)
        else:
            header += _checked_header(file, record, column)


def _names(fields: list[str]) -> list[str]:
    return [field.strip().strip('"').strip() for field in fields]


def _checked_header(file: Path, record: Record, column: str | None) -> list[str]:
    place = f"{file}: line {record.line}: the header"
    if record.error:
        raise ValueError(f"{place} cannot be read: {record.error}")
    header = _names(record.fields)
    found = f"its columns are {listed(header)}"
    if not set(header) & set(FILE_COLUMNS):
        raise ValueError(f"{place} has no column of image files ({', '.join(FILE_COLUMNS)}): {found}")
    captions = CAPTION_COLUMNS if column is None else (column,)
    if not set(header) & set(captions):
        raise ValueError(f"{place} has no caption column ({', '.join(map(repr, captions))}): {found}")
    for name in (*FILE_COLUMNS, *captions):
        if header.count(name) > 1:
            raise ValueError(f"{place} has the column {name!r} {header.count(name)} times: rename all but one")
    return header


def _csv_row(file: Path, record: Record, header: list[str]) -> _Row:
    values = dict(zip(header, record.fields, strict=False))
    image, error = _image(values), record.error
    if error is None and len(record.fields) != len(header):
        count = f"{len(record.fields)}, and the header has {len(header)}: quote a caption with a comma"
        error = f"has another number of fields than the header ({count})"
    return _row(f"{file}: line {record.line}", image, values, error)


def _json_rows(file: Path, lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        values, error = {}, None
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                values, error = {}, "is not a JSON object"
        except (ValueError, RecursionError) as problem:
            error = f"is not JSON ({problem})"
        yield _row(
            f"{file}: line {number}", _image(values), values, "is not UTF-8" if UNDECODED.search(line) else error
        )


def _row(place: str, image: str, values: dict[str, Any], error: str | None) -> _Row:
    text = "".join(value for value in values.values() if isinstance(value, str))
    if UNDECODED.search(text):
        error = "is not UTF-8"
    elif "\0" in text:
        error = error or "has a NUL byte"
    return _Row(f"{place}, {image:.200}" if image else place, image, values, error)


def _image(values: dict[str, Any]) -> str:
    """Return the image file that a row names, or nothing."""
    found = (values.get(name) for name in FILE_COLUMNS)
    return next((name.strip() for name in found if isinstance(name, str) and name.strip()), "")


def _starts_as_utf_16(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(2) in UTF_16
