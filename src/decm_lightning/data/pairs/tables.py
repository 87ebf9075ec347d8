"""Text-image pairs of parquet and Arrow files of the Hugging Face datasets library."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decm_lightning.data.pairs.lists import read_image
from decm_lightning.data.pairs.pair import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    DataError,
    Pair,
    caption_of,
    listed,
    missing_column,
)
from decm_lightning.errors import missing_extra
from decm_lightning.files import describe_unreadable

BATCH = 64
MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_table(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    """Yield the pairs of a parquet or Arrow file (stream or file format): `image` and a column of captions.

    An image is {"bytes", "path"}, or bytes, or the name of an image file, relative to the table's folder. The name may
    also be in a column such as `file_name`; bytes in any column come before names. A damaged row group or record batch
    costs its own rows.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise missing_extra(file.name, "pyarrow", "text") from error
    try:
        if file.suffix.lower() == ".parquet":
            yield from _parquet(file, column)
        else:
            yield from _arrow(file, column)
    except (pyarrow.ArrowException, OSError) as error:
        reason = describe_unreadable(file, text=True) or _first_line(error)
        yield DataError(str(file), f"cannot be read ({reason})", None)


def _parquet(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    import pyarrow
    from pyarrow import parquet

    with pyarrow.memory_map(str(file)) as opened:
        table = parquet.ParquetFile(opened, page_checksum_verification=True)
        columns = _columns(file, table.schema_arrow, column, table.metadata.num_rows)
        if isinstance(columns, DataError):
            yield columns
            return
        first = 0
        for group in range(table.num_row_groups):
            count, done, reason = table.metadata.row_group(group).num_rows, 0, "it ends early"
            try:
                for batch in table.iter_batches(BATCH, row_groups=[group], columns=columns):
                    yield from _rows(file, first + done, batch, column)
                    done += len(batch)
            except (pyarrow.ArrowException, OSError) as error:
                reason = _first_line(error)
            if done < count:
                rows = f"row group {group} (rows {first + done} to {first + count - 1}, {count - done} rows)"
                yield DataError(f"{file}: {rows}", f"cannot be read ({reason})", count - done)
            first += count


def _arrow(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(file)) as opened:
        is_file = opened.read(len(MAGIC)) == MAGIC
        opened.seek(0)
        reader = ipc.open_file(opened) if is_file else ipc.open_stream(opened)
        columns = _columns(file, reader.schema, column, None)
        if isinstance(columns, DataError):
            yield columns
            return
        batches = _of_file(reader) if is_file else _of_stream(reader, opened)
        first = 0
        for batch in batches:
            if isinstance(batch, Exception):
                place = f"{file}: after row {first - 1}" if first else str(file)
                yield DataError(place, f"an unknown number of rows cannot be read ({_first_line(batch)})", None)
                continue
            yield from _rows(file, first, batch.select(columns), column)
            first += len(batch)


def _of_file(reader: Any) -> Iterator[Any]:
    import pyarrow

    for number in range(reader.num_record_batches):
        try:
            yield reader.get_batch(number)
        except (pyarrow.ArrowException, OSError) as error:
            yield error


def _of_stream(reader: Any, opened: Any) -> Iterator[Any]:
    import pyarrow

    while True:
        place = opened.tell()
        try:
            yield reader.read_next_batch()
        except StopIteration:
            break
        except (pyarrow.ArrowException, OSError) as error:
            yield error
            # A batch whose length is known is behind us; without it, the next one cannot be found.
            if opened.tell() in (place, opened.size()):
                return
    opened.seek(max(opened.size() - len(END_OF_STREAM), 0))
    if opened.read() != END_OF_STREAM:
        yield OSError("it does not end as an Arrow stream: it is cut short or its writer was not closed")


def _columns(file: Path, schema: Any, column: str | None, count: int | None) -> list[str] | DataError:
    """Return the columns that are read, or what is wrong with the table as a whole."""
    captions = [name for name in (CAPTION_COLUMNS if column is None else (column,)) if name in schema.names]
    images = [name for name in FILE_COLUMNS if name in schema.names]
    for name in {*captions, *images}:
        if schema.names.count(name) > 1:
            return DataError(str(file), f"has a column twice ({name})", count)
    if not images:
        return DataError(str(file), f"has no column image (its columns are {listed(schema.names)})", count)
    if not captions:
        error = missing_column(str(file), schema.names, column)
        return DataError(error.place, error.what, count, error.columns)
    return list(dict.fromkeys([*images, *captions]))


def _rows(file: Path, first: int, batch: Any, column: str | None) -> Iterator[Pair | DataError]:
    import pyarrow

    try:
        # Text as bytes, so that one value that is not UTF-8 costs its own row.
        values = {name: batch[name].cast(_without_text(batch.schema.field(name).type)) for name in batch.schema.names}
        for array in values.values():
            # Damaged offsets would read outside of the file.
            array.validate(full=True)
    except pyarrow.ArrowException as error:
        rows = f"rows {first} to {first + len(batch) - 1}"
        yield DataError(f"{file}: {rows}", f"cannot be read ({_first_line(error)})", len(batch))
        return
    text = {name for name in batch.schema.names if _is_text(batch.schema.field(name).type)}
    for row in range(len(batch)):
        place = f"{file}: row {first + row}"
        try:
            found = {name: array[row].as_py() for name, array in values.items()}
            found |= {name: found[name].decode() for name in text if found[name] is not None}
            yield _pair(file, place, first + row, found, column)
        except UnicodeDecodeError:
            yield DataError(place, "is not UTF-8")


def _pair(file: Path, place: str, row: int, values: dict[str, Any], column: str | None) -> Pair | DataError:
    caption = caption_of(place, values, column)
    if isinstance(caption, DataError):
        return caption
    images = [_content_and_path(values.get(name)) for name in FILE_COLUMNS]
    name = f"{file.stem}/{row}"
    # Next to its bytes, an image may have the name of the file that they came from.
    contents = [content for content, _ in images if content is not None]
    if contents:
        return Pair(place, name, contents[0], caption)
    if path := next((path for _, path in images if path), ""):
        read = read_image(f"{place}, {path:.200}", file.parent / path)
        return read if isinstance(read, DataError) else Pair(place, name, read[0], caption, read[1])
    return DataError(place, "has no image (expected bytes or the name of a file)")


def _content_and_path(image: Any) -> tuple[bytes | None, str]:
    path: Any = image
    if isinstance(image, dict):
        path, image = image.get("path"), image.get("bytes")
        path = path.decode() if isinstance(path, bytes) else path
    return image if isinstance(image, bytes) else None, path if isinstance(path, str) else ""


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _without_text(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if _is_text(kind):
        return pyarrow.large_binary() if types.is_large_string(kind) else pyarrow.binary()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_text(field.type)) for field in kind])
    return kind


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
