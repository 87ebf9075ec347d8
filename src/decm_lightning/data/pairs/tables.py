"""Read text-image pairs from parquet and Arrow tables, in the format of Hugging Face's `datasets`.

`datasets` itself stops at the first damaged row group, damaged record batch or character that is not UTF-8. It does not
notice that a stream is cut short, and it does not name rows. This reader does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow import ipc, parquet, types

from decm_lightning.data.pairs.pair import (
    FILE_COLUMNS,
    DataError,
    Pair,
    caption_columns,
    first_line,
    listed,
    missing_column,
    pair_of,
)
from decm_lightning.files import describe_unreadable

BATCH = 64
MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
FAILURES = (pyarrow.ArrowException, OSError)


class _Lost(NamedTuple):
    """Rows that cannot be read: the reason, their number if it is known, and their row group."""

    reason: str
    rows: int | None = None
    group: int | None = None


def read_table(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    """Yield the pairs of a parquet or Arrow file (stream or file format), from `image` and a column of captions.

    `pair_of` describes the values of an image. A damaged row group or record batch loses only its own rows.
    """
    try:
        with pyarrow.memory_map(str(file)) as opened:
            is_parquet = file.suffix.lower() == ".parquet"
            table = parquet.ParquetFile(opened, page_checksum_verification=True) if is_parquet else _arrow(opened)
            schema, count = (table.schema_arrow, table.metadata.num_rows) if is_parquet else (table.schema, None)
            columns = _columns(file, schema, column, count)
            if isinstance(columns, DataError):
                yield columns
                return
            first = 0
            for batch in _row_groups(table, columns) if is_parquet else _record_batches(table, opened):
                if isinstance(batch, _Lost):
                    yield _lost(file, first, batch)
                    first += batch.rows or 0
                else:
                    yield from _rows(file, first, batch.select(columns), column)
                    first += len(batch)
    except FAILURES as error:
        reason = describe_unreadable(file, text=True) or first_line(error)
        yield DataError(str(file), f"cannot be read ({reason})", None)


def _lost(file: Path, first: int, lost: _Lost) -> DataError:
    if lost.rows is None:
        place = f"{file}: after row {first - 1}" if first else str(file)
        return DataError(place, f"an unknown number of rows cannot be read ({lost.reason})", None)
    rows = f"row group {lost.group} (rows {first} to {first + lost.rows - 1}, {lost.rows} rows)"
    return DataError(f"{file}: {rows}", f"cannot be read ({lost.reason})", lost.rows)


def _row_groups(table: Any, columns: list[str]) -> Iterator[Any]:
    """Yield the record batches of parquet, and the lost rows of each row group."""
    for group in range(table.num_row_groups):
        count, reason = table.metadata.row_group(group).num_rows, "it ends early"
        try:
            for batch in table.iter_batches(BATCH, row_groups=[group], columns=columns):
                yield batch
                count -= len(batch)
        except FAILURES as error:
            reason = first_line(error)
        if count > 0:
            yield _Lost(reason, count, group)


def _arrow(opened: Any) -> Any:
    is_file = opened.read(len(MAGIC)) == MAGIC
    opened.seek(0)
    return ipc.open_file(opened) if is_file else ipc.open_stream(opened)


def _record_batches(reader: Any, opened: Any) -> Iterator[Any]:
    """Yield the record batches of Arrow, and the lost rows between them."""
    number = 0
    is_file = hasattr(reader, "num_record_batches")
    while not is_file or number < reader.num_record_batches:
        place = opened.tell()
        try:
            yield reader.get_batch(number) if is_file else reader.read_next_batch()
        except StopIteration:
            break
        except FAILURES as error:
            yield _Lost(first_line(error))
            # If the length of the damaged batch is unknown, the next batch of a stream cannot be found.
            if not is_file and opened.tell() in (place, opened.size()):
                return
        number += 1
    opened.seek(max(opened.size() - len(END_OF_STREAM), 0))
    if not is_file and opened.read() != END_OF_STREAM:
        yield _Lost("it does not end as an Arrow stream: it is cut short or its writer was not closed")


def _columns(file: Path, schema: Any, column: str | None, count: int | None) -> list[str] | DataError:
    """Return the columns to read, or the error of the whole table."""
    captions = [name for name in caption_columns(column) if name in schema.names]
    images = [name for name in FILE_COLUMNS if name in schema.names]
    for name in {*captions, *images}:
        if schema.names.count(name) > 1:
            return DataError(str(file), f"has a column twice ({name})", count)
    if not images:
        return DataError(str(file), f"has no column image (its columns are {listed(schema.names)})", count)
    if not captions:
        return missing_column(str(file), schema.names, column, count)
    return list(dict.fromkeys([*images, *captions]))


def _rows(file: Path, first: int, batch: Any, column: str | None) -> Iterator[Pair | DataError]:
    try:
        # Text is read as bytes, so that a value that is not UTF-8 loses only its own row.
        values = {name: batch[name].cast(_without_text(batch.schema.field(name).type)) for name in batch.schema.names}
        for array in values.values():
            # Damaged offsets would be followed outside of the file.
            array.validate(full=True)
    except pyarrow.ArrowException as error:
        rows = f"rows {first} to {first + len(batch) - 1}"
        yield DataError(f"{file}: {rows}", f"cannot be read ({first_line(error)})", len(batch))
        return
    text = {name for name in batch.schema.names if _is_text(batch.schema.field(name).type)}
    for row in range(len(batch)):
        place = f"{file}: row {first + row}"
        try:
            found = {name: array[row].as_py() for name, array in values.items()}
            found |= {name: found[name].decode() for name in text if found[name] is not None}
            yield pair_of(place, found, file.parent, column, f"{file.stem}/{first + row}")
        except UnicodeDecodeError:
            yield DataError(place, "is not UTF-8")


def _is_text(kind: Any) -> bool:
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _without_text(kind: Any) -> Any:
    if _is_text(kind):
        return pyarrow.large_binary() if types.is_large_string(kind) else pyarrow.binary()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_text(field.type)) for field in kind])
    return kind
