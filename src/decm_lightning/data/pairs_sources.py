"""Where text-image pairs come from: webdataset tars, parquet or Arrow tables, or a folder with a CSV file."""

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = (".txt", ".json")
FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")
CAPTION_COLUMNS = ("caption", "text", "prompt")
BLOCK = 512


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
    """What is wrong, and in which file, row or member."""

    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


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
    for endings, reader in READERS.items():
        found = [source] if source.suffix in endings else []
        if source.is_dir():
            found = sorted(file for ending in endings for file in source.rglob(f"*{ending}"))
        if reader is read_csv and len(found) > 1:
            raise ValueError(f"{source} has {len(found)} CSV files: give the one to read")
        if found:
            return found, reader
    expected = ", ".join(f"*{ending}" for endings in READERS for ending in endings)
    raise FileNotFoundError(f"no pairs in {source}: expected {expected}")


def read_tar(file: Path, column: str | None) -> Iterator[Pair | Fault]:
    """Give the pairs of a webdataset tar: neighbours of one name up to its first dot, image and .txt or .json.

    A tar that is cut short is one fault; what stands before the cut is given.
    """
    parts: dict[str, bytes] = {}
    name = ""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                stem, _, ending = path.name.partition(".")
                key = str(path.parent / stem)
                if key != name:
                    yield from _of_members(file, name, parts, column)
                    name, parts = key, {}
                content = tar.extractfile(member)
                assert content is not None
                parts[f".{ending.lower()}"] = content.read()
    except tarfile.TarError as error:
        yield from _of_members(file, name, parts, column)
        yield Fault(str(file), f"is cut short or no tar ({error})")
        return
    yield from _of_members(file, name, parts, column)
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 2 * BLOCK))
        end = opened.read()
    if any(end) or len(end) < 2 * BLOCK:
        yield Fault(str(file), "is cut short: it does not end as a tar")


def _of_members(file: Path, name: str, parts: dict[str, bytes], column: str | None) -> Iterator[Pair | Fault]:
    images = [ending for ending in IMAGES if ending in parts]
    captions = [ending for ending in CAPTIONS if ending in parts]
    place = f"{file}: {name}"
    if not images and not captions:
        return
    if not images:
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
    return found[0] if isinstance(found[0], str) else Fault(place, f"its caption is no text but {found[0]!r:.40}")


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
    except (pyarrow.ArrowException, OSError) as error:
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

    Image files that no row names are faults, too.
    """
    named: set[Path] = set()
    with file.open(newline="", encoding="utf-8-sig") as opened:
        rows = csv.DictReader(opened)
        try:
            for values in rows:
                given = {name: value for name, value in values.items() if name and value}
                path = next((given[name] for name in FILE_COLUMNS if name in given), None)
                place = f"{file}: line {rows.line_num}"
                if path is None:
                    yield Fault(place, f"names no image ({' or '.join(FILE_COLUMNS)})")
                    continue
                named.add(file.parent / path)
                yield _of_file(place, file.parent / path, path, _caption(f"{place}, {path}", given, column))
        except (csv.Error, UnicodeDecodeError) as error:
            yield Fault(f"{file}: line {rows.line_num + 1}", f"cannot be read ({error})")
    for image in sorted(file.parent.rglob("*")):
        if image.suffix.lower() in IMAGES and image not in named:
            yield Fault(str(image), f"has no caption in {file.name}")


def _of_file(place: str, image: Path, path: str, caption: str | Fault) -> Pair | Fault:
    if isinstance(caption, Fault):
        return caption
    if not image.is_file():
        return Fault(place, f"there is no image {path}")
    return Pair(f"{place}, {path}", path, image.read_bytes(), caption)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


READERS: dict[tuple[str, ...], Reader] = {
    (".tar",): read_tar,
    (".parquet", ".arrow"): read_table,
    (".csv",): read_csv,
}
