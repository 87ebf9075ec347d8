"""Where text-image pairs come from: webdataset tars, parquet or Arrow tables, or a folder with a CSV file."""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from decm_lightning.data.tars import ends_whole

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGES = (".avif", ".bmp", ".gif", ".heic", ".tif", ".tiff")
CAPTIONS = (".txt", ".json")
FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Pair:
    """An image file's bytes with its caption.

    Attributes:
        place: the file, and the row or member in it, for messages.
        name: what tells the pair from all others of its source.
        image: the bytes of a JPEG, PNG or WebP file.
        caption: as it is written.
    """

    place: str
    name: str
    image: bytes
    caption: str


@dataclass(frozen=True)
class Fault:
    """What is wrong, and in which file, row or member.

    Attributes:
        place: the file, and the row or member in it.
        what: the kind, in the same words for all faults of it, and mostly more in brackets.
    """

    place: str
    what: str

    def __str__(self) -> str:
        # The name of a file or member need not be UTF-8.
        return f"{self.place}: {self.what}".encode(errors="backslashreplace").decode()

    @property
    def kind(self) -> str:
        """What is wrong without the particulars."""
        return self.what.partition(" (")[0]


Reader = Callable[[Path, str | None], Iterator[Pair | Fault]]


def files_of(source: Path) -> tuple[list[Path], Reader]:
    """Return the files that a source is made of, in order, and what reads each.

    A folder is one of tars if there is a tar in it, else of tables, else with a CSV file.

    Raises:
        FileNotFoundError: if there is no such file or folder, or nothing of the kind in it.
        ValueError: if a folder has several CSV files.
    """
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {source}: give tars, parquet files, or a folder with a CSV file")
    inside = sorted(source.rglob("*")) if source.is_dir() else [source]
    for endings, reader in READERS.items():
        found = [file for file in inside if file.suffix in endings and file.is_file()]
        if reader is read_csv and len(found) > 1:
            raise ValueError(f"{source} has {len(found)} CSV files: give the one to read")
        if found:
            return found, reader
    expected = ", ".join(f"*{ending}" for endings in READERS for ending in endings)
    raise FileNotFoundError(f"no pairs in {source}: expected {expected}")


def read_tar(file: Path, column: str | None) -> Iterator[Pair | Fault]:
    """Give the pairs of a webdataset tar: neighbours of one name up to its first dot, image and .txt or .json.

    As in webdataset, what has no ending or no name before it is passed over (`README`, `.hidden`), as is what else a
    whole pair has (`a.cls`, `a.mask.png`). Members of a name that has neither image nor caption are faults (`h.gif`, or
    `photo.v1.jpg` with `photo.v1.txt`, whose endings start at the first dot), as is the second of one name and ending.
    A tar that is cut short or broken is one fault; what stands before the cut is given.
    """
    parts: dict[str, bytes] = {}
    name = ""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                if not (member.isfile() and stem and ending):
                    continue
                key = str(path.parent / stem)
                if key != name:
                    yield from _of_members(file, name, parts, column)
                    name, parts = key, {}
                ending = f".{ending.lower()}"
                if ending in parts:
                    yield Fault(f"{file}: {member.name}", "is there twice")
                    continue
                content = tar.extractfile(member)
                assert content is not None
                parts[ending] = content.read()
            whole = ends_whole(tar)
    except tarfile.TarError as error:
        yield from _of_members(file, name, parts, column)
        yield Fault(str(file), f"is cut short or no tar ({error})")
        return
    yield from _of_members(file, name, parts, column)
    if not whole:
        yield Fault(str(file), f"is cut short: it does not end as a tar (after {name or 'nothing'})")


def _of_members(file: Path, name: str, parts: dict[str, bytes], column: str | None) -> Iterator[Pair | Fault]:
    images = [ending for ending in IMAGES if ending in parts]
    captions = [ending for ending in CAPTIONS if ending in parts]
    place = f"{file}: {name}"
    if not images and not captions:
        expected = f"{', '.join(IMAGES)}; {', '.join(CAPTIONS)}"
        what = f"is neither image nor caption by what follows its first dot ({expected})"
        yield from (Fault(place + ending, what) for ending in parts)
    elif not images:
        yield Fault(place + captions[0], f"has no image ({', '.join(IMAGES)})")
    elif not captions:
        yield Fault(place + images[0], f"has no caption ({', '.join(CAPTIONS)})")
    else:
        caption = _caption_of_file(place + captions[0], parts[captions[0]], captions[0], column)
        if isinstance(caption, Fault):
            yield caption
        else:
            yield Pair(place + images[0], f"{file.stem}/{name}", parts[images[0]], caption)


def _caption_of_file(place: str, content: bytes, ending: str, column: str | None) -> str | Fault:
    try:
        text = content.decode()
        if ending == ".txt":
            return text
        return _caption(place, json.loads(text), column)
    except UnicodeDecodeError:
        return Fault(place, "is not UTF-8")
    except json.JSONDecodeError as error:
        return Fault(place, f"is no JSON ({error})")


def _caption(place: str, values: Any, column: str | None) -> str | Fault:
    names = CAPTION_COLUMNS if column is None else (column,)
    found = [values[name] for name in names if name in values] if isinstance(values, dict) else []
    if not found:
        return Fault(place, f"has no caption ({' or '.join(names)})")
    return found[0] if isinstance(found[0], str) else Fault(place, f"its caption is no text ({found[0]!r:.40})")


def read_table(file: Path, column: str | None) -> Iterator[Pair | Fault]:
    """Give the pairs of a parquet or Arrow file of the Hugging Face datasets library: `image` and a column of captions.

    An image is {"bytes", "path"} or bytes.

    Raises:
        ImportError: if pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise ImportError(f"{file.name} needs pyarrow: pip install pyarrow") from error
    row = 0
    try:
        is_parquet = file.suffix == ".parquet"
        opened = pyarrow.memory_map(str(file))
        for batch in parquet.ParquetFile(opened).iter_batches(64) if is_parquet else ipc.open_stream(opened):
            for values in batch.to_pylist():
                yield _of_row(file, row, values, column)
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Fault(f"{file}: after row {row}" if row else str(file), f"cannot be read ({_first_line(error)})")


def _of_row(file: Path, row: int, values: dict[str, Any], column: str | None) -> Pair | Fault:
    place = f"{file}: row {row}"
    caption = _caption(place, {name: value for name, value in values.items() if value is not None}, column)
    if isinstance(caption, Fault):
        return caption
    image = values.get("image")
    image = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(image, bytes):
        return Fault(place, "has no image (bytes in the column image)")
    return Pair(place, f"{file.stem}/{row}", image, caption)


def read_csv(file: Path, column: str | None) -> Iterator[Pair | Fault]:
    """Give the pairs of a CSV file with a header, which names image files beside it and their captions.

    Image files that no row names are faults, too, whatever their format.
    """
    for row in _rows(file):
        yield row if isinstance(row, Fault) else _of_file(row, column)
    named = named_in(file)
    for image in sorted(file.parent.rglob("*")):
        if image.suffix.lower() in IMAGES + OTHER_IMAGES and image not in named:
            yield Fault(str(image), f"has no caption in {file.name}")


def named_in(file: Path) -> set[Path]:
    """Return the image files that a CSV file names, whether they are there or not."""
    return {row.image for row in _rows(file) if not isinstance(row, Fault)}


@dataclass(frozen=True)
class _Row:
    """A row of a CSV file, and the image that it names as `path`."""

    place: str
    path: str
    image: Path
    values: dict[str | None, Any]


def _rows(file: Path) -> Iterator[_Row | Fault]:
    with file.open(newline="", encoding="utf-8-sig") as opened:
        rows = csv.DictReader(opened)
        try:
            for values in rows:
                path = next((values[name] for name in FILE_COLUMNS if values.get(name)), None)
                place = f"{file}: line {rows.line_num}"
                if path is None:
                    yield Fault(place, f"names no image ({' or '.join(FILE_COLUMNS)})")
                else:
                    yield _Row(f"{place}, {path:.200}", path, file.parent / path, values)
        except (csv.Error, UnicodeDecodeError) as error:
            yield Fault(f"{file}: line {rows.line_num + 1}", f"cannot be read ({error})")


def _of_file(row: _Row, column: str | None) -> Pair | Fault:
    if None in row.values:
        return Fault(row.place, "has more fields than the header (a caption with a comma needs quotes)")
    caption = _caption(row.place, {name: value for name, value in row.values.items() if value}, column)
    if isinstance(caption, Fault):
        return caption
    try:
        return Pair(row.place, row.path, row.image.read_bytes(), caption)
    except (OSError, ValueError) as error:
        return Fault(row.place, f"its image cannot be read ({getattr(error, 'strerror', error)})")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


READERS: dict[tuple[str, ...], Reader] = {
    (".tar",): read_tar,
    (".parquet", ".arrow"): read_table,
    (".csv",): read_csv,
}
