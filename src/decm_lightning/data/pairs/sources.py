"""Find the text-image pairs of a source: tars, tables, a list of image files, or a data set of Hugging Face.

Every source yields a stream of `Pair` and `DataError`.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from decm_lightning.data.pairs.lists import read_list
from decm_lightning.data.pairs.pair import IMAGES, OTHER_IMAGES, DataError, Pair, stamp_of
from decm_lightning.data.pairs.tars import TARS, read_tar
from decm_lightning.errors import needs
from decm_lightning.image_listing import counted, list_files
from decm_lightning.image_listing import kind as kind_of

TABLES = (".parquet", ".arrow", ".feather")
LISTS = (".csv", ".tsv", ".jsonl")
COMPRESSED = (".tar.zst", ".tar.lz4", ".tar.z", ".zip", ".7z", ".csv.gz", ".jsonl.gz", ".parquet.gz")
"""Suffixes of files that may hold pairs but are not supported."""

PairRows = Iterator[Pair | DataError]


def _read_table(file: Path, column: str | None) -> PairRows:
    # Imported when it is used: pyarrow is optional, and its import takes a second.
    with needs(f"{file}", "pyarrow", "text"):
        from decm_lightning.data.pairs.tables import read_table
    return read_table(file, column)


KINDS: dict[str, tuple[tuple[str, ...], Callable[[Path, str | None], PairRows]]] = {
    "tars": (TARS, read_tar),
    "tables": (TABLES, _read_table),
    "lists": (LISTS, read_list),
}


@dataclass(frozen=True)
class PairSource:
    """The pairs of a source.

    `identity` has values for JSON that change when the source changes. `rows(column)` yields the pairs and errors in
    order. `unread` is the number of files that are not read, by kind.
    """

    identity: list[Any]
    rows: Callable[[str | None], PairRows]
    unread: Counter[str]


def find_pairs(source: Path, split: str | None = None) -> PairSource:
    """Find the pairs of a source: a file, a folder with its subfolders, or a pattern such as "train-*.tar".

    With a `split`, Hugging Face's `datasets` reads the source, which may also be a name on the hub; see `DataSet`.

    A table next to a tar of the same name, as img2dataset writes it, describes the tar and is not read. A file that
    several links point to is read once.
    """
    if split is not None:
        with needs(f"the data set {source}", "datasets", "text"):
            from decm_lightning.data.pairs.hugging_face import DataSet
        data_set = DataSet(str(source), split)
        return PairSource(data_set.identity(), data_set.pairs, Counter())
    readable = tuple(suffix for suffixes, _ in KINDS.values() for suffix in suffixes)
    found, unread = _candidates(source, readable + COMPRESSED)
    compressed = [path for path in found if _ends(path, COMPRESSED)]
    files = {kind: [path for path in found if _ends(path, suffixes)] for kind, (suffixes, _) in KINDS.items()}
    described = {path.parent / path.name.partition(".tar")[0] for path in files["tars"]}
    metadata = [path for path in files["tables"] if path.with_suffix("") in described]
    files["tables"] = [path for path in files["tables"] if path not in metadata]
    unread += Counter(kind_of(path.name) for path in compressed + metadata)
    kind = _only_kind(source, files, unread, bool(compressed))
    named = []
    if kind == "lists":
        folder = files[kind][0].parent
        named = [folder.joinpath(*parts) for parts in list_files(folder, IMAGES + OTHER_IMAGES).files]
    if kind != "tars":
        # Lists and tables refer to image files.
        unread = Counter({suffix: count for suffix, count in unread.items() if suffix not in IMAGES})
    identity = [(os.path.realpath(path), astuple(stamp_of(path))) for path in files[kind] + named]
    read = KINDS[kind][1]
    return PairSource(identity, lambda column: chain.from_iterable(read(file, column) for file in files[kind]), unread)


def _only_kind(source: Path, files: dict[str, list[Path]], unread: Counter[str], compressed: bool) -> str:
    kinds = [kind for kind in files if files[kind]]
    if not kinds:
        expected = ", ".join(f"*{suffix}" for suffixes, _ in KINDS.values() for suffix in suffixes)
        others = f"; it has {counted(unread)}" if unread else ""
        unpack = " (decompress them first)" if compressed else ""
        raise FileNotFoundError(f"no pairs in {source}: expected {expected}{others}{unpack}")
    if len(kinds) > 1:
        counts = " and ".join(f"{len(files[kind])} {kind} (such as {files[kind][0].name})" for kind in kinds)
        raise ValueError(f'{source} has {counts}: choose one kind with a folder or a pattern such as "*.tar"')
    if kinds == ["lists"] and len(files["lists"]) > 1:
        names = ", ".join(map(str, files["lists"][:3]))
        raise ValueError(f"{source} has {len(files['lists'])} lists of images ({names} ...): choose one of them")
    return kinds[0]


def _candidates(source: Path, suffixes: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """Return the files with one of the suffixes, each once, and the number of other files by kind."""
    if source.is_dir():
        listing = list_files(source, {PurePath(f"x{suffix}").suffix for suffix in suffixes})
        paths, others = [source.joinpath(*parts) for parts in listing.files], listing.left_out
    else:
        paths, others = [source] if source.exists() else sorted(map(Path, glob.glob(str(source)))), Counter()
        if not paths:
            expected = (
                "expected tars, parquet or Arrow files, a folder of them, a list (.csv, .jsonl), or split for the hub"
            )
            raise FileNotFoundError(f"no file or folder {source}: {expected}")
    once: dict[str, Path] = {}
    for path in paths:
        if not _ends(path, suffixes) or not path.is_file():
            others[kind_of(path.name)] += 1
        elif once.setdefault(os.path.realpath(path), path) != path:
            others["links to files that are read"] += 1
    return list(once.values()), others


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes))
