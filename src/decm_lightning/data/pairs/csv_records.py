"""Read CSV records one at a time, so that a damaged line loses only its own row."""

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

MAX_LINES = 100
"""Maximum number of lines in a quoted field."""


@dataclass(frozen=True)
class Record:
    """One record of a CSV file.

    Attributes:
        line: number of its first line, counted from 1.
        fields: its values. With an error, its first line split at each delimiter.
        error: why the record cannot be read; None if it can be read.
    """

    line: int
    fields: list[str]
    error: str | None = None


def records(
    lines: Iterable[str], delimiter: str, header: Sequence[str], names_an_image: Callable[[list[str]], bool]
) -> Iterator[Record]:
    r"""Yield the records of a CSV file, including quoted fields with line breaks. Blank lines are skipped.

    A record cannot be read if a quote is not closed within 100 lines, if text follows a closing quote, or if a field
    exceeds the csv module's limit. Reading then resumes at the line after its first one. An open quote may also be
    closed by a quote of a later row. Therefore a record of several lines is an error if it has another number of fields
    than the header, or if more than one of its lines is itself a row.

    Example:
        >>> lines = ["a.png,one\n", 'b.png,"open\n', "c.png,three\n"]
        >>> for record in records(lines, ",", ["file", "text"], lambda fields: fields[0].endswith(".png")):
        ...     print(record.fields, record.error)
        ['a.png', 'one'] None
        ['b.png', '"open'] the quote of line 2 is not closed
        ['c.png', 'three'] None

    Args:
        lines: the lines with their line breaks.
        delimiter: one character.
        header: the columns. The caller may add them after the first record.
        names_an_image: returns whether the values of a row with the header's number of fields name an image file.
    """
    source = iter(lines)
    waiting: deque[str] = deque()
    number = 1

    def is_row(line: str) -> bool:
        fields = _split(line, delimiter)
        return len(fields) == len(header) and names_an_image(fields)

    while True:
        reader = csv.reader(_feed(waiting, source), delimiter=delimiter, strict=True)
        try:
            if (fields := next(reader, None)) is None:
                return
            used, error = reader.line_num, None
            if used > 1 and header and (len(fields) != len(header) or sum(map(is_row, islice(waiting, used))) > 1):
                error = f"the quote of line {number} is not closed"
        except csv.Error as problem:
            error = _reason(str(problem), number, reader.line_num)
        if error:
            fields, used = _split(waiting[0], delimiter), 1
        if fields:
            yield Record(number, fields, error)
        for _ in range(used):
            waiting.popleft()
        number += used


def _feed(waiting: deque[str], source: Iterator[str]) -> Iterator[str]:
    for line in range(MAX_LINES):
        if line == len(waiting):
            following = next(source, None)
            if following is None:
                return
            waiting.append(following)
        yield waiting[line]


def _split(line: str, delimiter: str) -> list[str]:
    return line.rstrip("\r\n").split(delimiter)


def _reason(problem: str, number: int, used: int) -> str:
    if "unexpected end of data" in problem or ("expected after" in problem and used > 1):
        return f"the quote of line {number} is not closed"
    if "expected after" in problem:
        return 'text follows a closing quote (a quote inside a quoted field is written "")'
    return f"cannot be read ({problem})"
