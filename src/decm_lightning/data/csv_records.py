"""CSV records one by one, so that a damaged line costs its own row and not the rest of the file."""

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

MAX_LINES = 100
"""A quote must be closed within this number of lines."""


@dataclass(frozen=True)
class Record:
    """One record of a CSV file.

    Attributes:
        line: the number of its first line, from 1.
        fields: its values; with an error, the first line split at the delimiter, as far as that goes.
        error: why it cannot be read; None if it can.
    """

    line: int
    fields: list[str]
    error: str | None = None


def records(lines: Iterable[str], delimiter: str, is_row: Callable[[list[str]], bool]) -> Iterator[Record]:
    """Yield the records of a CSV file, including quoted fields with line breaks. Blank lines are skipped.

    If a record cannot be read, reading resumes at the line after its first one. That is the case if a quote is not
    closed within 100 lines, if text follows a closing quote, if a field is beyond the csv module's limit, or if several
    lines of the record are rows of their own, because a quote that was left open swallows the rows after it.

    Args:
        lines: the lines with their ends.
        delimiter: one character.
        is_row: whether the values of a line, split at the delimiter, are a complete row.
    """
    source = iter(lines)
    waiting: deque[str] = deque()
    number = 1
    while True:
        reader = csv.reader(_feed(waiting, source), delimiter=delimiter, strict=True)
        try:
            fields = next(reader, None)
            if fields is None:
                return
            used, error = reader.line_num, None
            if used > 1 and sum(is_row(_split(waiting[line], delimiter)) for line in range(used)) > 1:
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
