"""Read lists of image files with captions: CSV files with a header, and JSON lines.

Hugging Face's `datasets` rejects a whole file because of one open quote, extra comma, incomplete line of JSON or
character that is not UTF-8. It fills a missing field with None and does not name lines. This reader does.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from decm_lightning.data.pairs.csv_records import Record, records
from decm_lightning.data.pairs.pair import (
    FILE_COLUMNS,
    IMAGES,
    OTHER_IMAGES,
    DataError,
    Pair,
    caption_columns,
    image_of,
    listed,
    pair_of,
)
from decm_lightning.image_listing import list_files

DELIMITERS = ",;\t|"
# The byte order marks.
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# errors="surrogateescape" decodes bytes that are not UTF-8 to these characters.
UNDECODED = re.compile("[\udc80-\udcff]")


class _Row(NamedTuple):
    """A row: the number of its first line, its values by column, and its error if it cannot be read."""

    line: int
    values: dict[str, Any]
    error: str | None = None


def read_list(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    """Yield the pairs of a CSV file with a header, or of JSON lines. A row has the name and caption of an image file.

    Names are relative to the folder of the list. Image files of any format in that folder are errors if no row names
    them. CSV fields may be separated by commas, semicolons, tabs or vertical bars.
    """
    named = set()
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        for row in _json_rows(lines) if file.suffix.lower() == ".jsonl" else _csv_rows(file, lines, column):
            # No file has a name with a NUL byte or an unpaired surrogate.
            with suppress(ValueError):
                if path := image_of(row.values)[1]:
                    named.add(os.path.realpath(file.parent / path))
            error = _text_error(row.values) or row.error
            yield pair_of(f"{file}: line {row.line}", row.values, file.parent, column, error=error)
    for parts in list_files(file.parent, IMAGES + OTHER_IMAGES).files:
        image = file.parent.joinpath(*parts)
        if (real := os.path.realpath(image)) not in named:
            named.add(real)
            yield DataError(str(image), f"has no caption in {file.name}")


def _json_rows(lines: Iterator[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield _Row(number, {}, "is not UTF-8" if UNDECODED.search(line) else f"is not JSON ({error})")
            continue
        yield _Row(number, values) if isinstance(values, dict) else _Row(number, {}, "is not a JSON object")


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
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8")
    delimiter = next((mark for mark in DELIMITERS if not {*_names(first.split(mark))}.isdisjoint(FILE_COLUMNS)), ",")
    header: list[str] = []

    def names_an_image(fields: list[str]) -> bool:
        name = image_of(dict(zip(header, fields, strict=True)))[1]
        return name.lower().endswith(IMAGES + OTHER_IMAGES) or (bool(name) and os.path.isfile(file.parent / name))

    for record in records(chain(before, lines), delimiter, header, names_an_image):
        if header:
            error, found = record.error, len(record.fields)
            if error is None and found != len(header):
                count = f"{found}, but the header has {len(header)}: quote captions with a comma"
                error = f"has another number of fields than the header ({count})"
            yield _Row(record.line, dict(zip(header, record.fields, strict=False)), error)
        else:
            header += _checked_header(file, record, column)


def _names(fields: list[str]) -> list[str]:
    return [field.strip().strip('"').strip() for field in fields]


def _checked_header(file: Path, record: Record, column: str | None) -> list[str]:
    place = f"{file}: line {record.line}: the header"
    if record.error:
        raise ValueError(f"{place} cannot be read: {record.error}")
    header, captions = _names(record.fields), caption_columns(column)
    found = f"its columns are {listed(header)}"
    if not set(header) & set(FILE_COLUMNS):
        raise ValueError(f"{place} has no column of image files ({', '.join(FILE_COLUMNS)}): {found}")
    if not set(header) & set(captions):
        raise ValueError(f"{place} has no caption column ({', '.join(map(repr, captions))}): {found}")
    for name in (*FILE_COLUMNS, *captions):
        if header.count(name) > 1:
            raise ValueError(f"{place} has the column {name!r} {header.count(name)} times: rename all but one")
    return header


def _text_error(values: dict[str, Any]) -> str | None:
    text = "".join(value for value in values.values() if isinstance(value, str))
    return "is not UTF-8" if UNDECODED.search(text) else "has a NUL byte" if "\0" in text else None


def _starts_as_utf_16(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(2) in UTF_16
