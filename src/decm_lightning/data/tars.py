"""Webdataset tars by the places of their members, so that images can be read in any order."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LABELS = (".cls", ".json", ".txt")
JSON_KEYS = ("label", "cls")
RECORD = 512


class TarMember(NamedTuple):
    """An image in a tar: its name, class, first byte and number of bytes."""

    name: str
    label: int
    offset: int
    length: int


def tar_members(tar: Path, suffixes: Sequence[str]) -> list[TarMember]:
    """Return the images of a plain tar in its order, with the labels that stand beside them.

    As in webdataset, files that have the same path up to the first dot of their name belong together.

    Args:
        tar: the file.
        suffixes: what names of images end with, in lower case.

    Raises:
        ValueError: naming the file and the member, if the tar is cut short, an image has no label, a label has no
            image, or a label is no number.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(tar, "r:") as content:
            for member in content:
                key, suffix = _split(member.name)
                if suffix in suffixes:
                    images[key] = member
                elif suffix in LABELS and (key not in labels or _rank(member) < _rank(labels[key])):
                    labels[key] = member
            if not ends_whole(content):
                raise ValueError(f"{tar} is cut short: it ends after {len(images)} images without the mark of its end")
            for key in sorted(images.keys() ^ labels.keys()):
                alone, lacks = (images[key], "label") if key in images else (labels[key], "image")
                raise ValueError(f"{tar}: {alone.name} has no {lacks} beside it")
            classes = {key: _label(tar, content, member) for key, member in labels.items()}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar} is no whole, plain tar: {error}") from error
    return [TarMember(file.name, classes[key], file.offset_data, file.size) for key, file in images.items()]


def ends_whole(tar: tarfile.TarFile) -> bool:
    """Return whether all members of a plain tar have been read: zeros mark its end.

    tarfile takes the end of the file, and a broken header, for the end of the archive.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    return tar.fileobj.read(RECORD) == bytes(RECORD)


def _split(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _rank(member: tarfile.TarInfo) -> int:
    return LABELS.index(_split(member.name)[1])


def _label(tar: Path, content: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = content.extractfile(member)
    text = file.read().decode(errors="replace").strip() if file else ""
    found: object = text
    try:
        if member.name.endswith(".json"):
            entries = json.loads(text)
            found = next(entries[key] for key in JSON_KEYS if key in entries)
        return int(str(found))  # int alone would cut off what follows a point
    except (ValueError, TypeError, StopIteration) as error:
        raise ValueError(f"{tar}: {member.name} holds no class number: got {str(found)[:40]!r}") from error
