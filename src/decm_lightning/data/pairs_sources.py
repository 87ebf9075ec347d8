"""Where text-image pairs come from: webdataset tars, parquet or Arrow tables, or a list of image files."""

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from decm_lightning.data.pair import IMAGES, OTHER_IMAGES, DataError, Pair
from decm_lightning.data.pairs_lists import read_list
from decm_lightning.data.pairs_tables import read_table
from decm_lightning.data.pairs_tars import TARS, read_tar
from decm_lightning.data.source_files import files_in

TABLES = (".parquet", ".arrow", ".feather")
LISTS = (".csv", ".tsv", ".jsonl")
COMPRESSED = (".tar.zst", ".tar.lz4", ".tar.z", ".zip", ".7z", ".csv.gz", ".jsonl.gz", ".parquet.gz")
"""Suffixes of files that may hold pairs, but that cannot be read."""

Reader = Callable[[Path, str | None], Iterator[Pair | DataError]]
KINDS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "tars": (TARS, read_tar),
    "tables": (TABLES, read_table),
    "lists": (LISTS, read_list),
}


@dataclass(frozen=True)
class PairSource:
    """The files of a source, in order, and the function that reads one of them.

    Attributes:
        files: tars, tables, or one list.
        reader: yields the pairs of a file.
        images: with a list, the image files in its folder.
        unread: how many files of other kinds are there, by suffix.
    """

    files: list[Path]
    reader: Reader
    images: list[Path]
    unread: dict[str, int]


def find_pairs(source: Path) -> PairSource:
    """Return the files of a source: a file, a folder with what is below it, or a pattern such as "train-*.tar".

    A table that has the name of a tar next to it, as img2dataset writes it, describes the tar and is not read.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no pairs in it.
        ValueError: if files of several kinds are there, or several lists.
    """
    readable = tuple(suffix for suffixes, _ in KINDS.values() for suffix in suffixes)
    found = _candidates(source, readable + COMPRESSED)
    compressed = [path for path in found if _ends(path, COMPRESSED)]
    files = {kind: [path for path in found if _ends(path, suffixes)] for kind, (suffixes, _) in KINDS.items()}
    described = {path.parent / path.name.partition(".tar")[0] for path in files["tars"]}
    metadata = [path for path in files["tables"] if path.with_suffix("") in described]
    files["tables"] = [path for path in files["tables"] if path not in metadata]
    kinds = [kind for kind in files if files[kind]]
    if not kinds:
        expected = ", ".join(f"*{suffix}" for suffix in readable)
        unpack = f"; decompress {_counted(_suffixes(compressed))}" if compressed else ""
        raise FileNotFoundError(f"no pairs in {source}: expected {expected}{unpack}")
    if len(kinds) > 1:
        counts = " and ".join(f"{len(files[kind])} {kind} (such as {files[kind][0].name})" for kind in kinds)
        raise ValueError(f'{source} has {counts}: give the files of one kind, by a folder or a pattern such as "*.tar"')
    (kind,) = kinds
    if kind == "lists" and len(files[kind]) > 1:
        names = ", ".join(str(path) for path in files[kind][:3])
        raise ValueError(f"{source} has {len(files[kind])} lists of images ({names} ...): give the one to read")
    folder = files[kind][0].parent if kind == "lists" else source
    images = files_in(folder, IMAGES + OTHER_IMAGES) if kind != "tables" and folder.is_dir() else []
    unread = _suffixes(compressed + metadata + (images if kind == "tars" else []))
    return PairSource(files[kind], KINDS[kind][1], images if kind == "lists" else [], unread)


def _candidates(source: Path, suffixes: Sequence[str]) -> list[Path]:
    if source.is_dir():
        return files_in(source, suffixes)
    if source.exists():
        return [source] if _ends(source, suffixes) else []
    matches = [path for path in map(Path, sorted(glob.glob(str(source)))) if path.is_file()]
    if not matches:
        expected = "give tars, parquet or Arrow files, a folder of them, or a list of images (.csv, .jsonl)"
        raise FileNotFoundError(f"no file or folder {source}: {expected}")
    return [path for path in matches if _ends(path, suffixes)]


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes))


def _suffixes(paths: Sequence[Path]) -> dict[str, int]:
    return dict(Counter(path.suffix.lower() for path in paths))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {suffix}" for suffix, count in counts.items())
