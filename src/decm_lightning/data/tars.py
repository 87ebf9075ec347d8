"""Webdataset tars by the positions of their members, so that images can be read in any order."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from decm_lightning.image_listing import is_hidden
from decm_lightning.image_reader import printable, suffixes

LABELS = (".cls", ".json", ".txt")
JSON_KEYS = ("label", "cls")
RECORD = 512
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
Fault = Callable[[str, str], None]
"""Takes the kind of a fault and a message that names where it is; raises the message or counts the kind."""


class TarMember(NamedTuple):
    """An image in a tar: its name, class, first byte and number of bytes."""

    name: str
    label: int
    offset: int
    length: int


class _Members(NamedTuple):
    images: dict[str, tarfile.TarInfo]
    labels: dict[str, tarfile.TarInfo]


def tar_members(tar: Path, fault: Fault, left_out: Counter[str]) -> list[TarMember]:
    """Return the images of a plain tar in its order, with the labels next to them.

    As in webdataset, files that have the same path up to the first dot of their name belong together.

    Args:
        tar: the file.
        fault: called if the tar is cut short, if an image has no label or a label no image, and if a label is not a
            number. If it returns, what it was called for is left out.
        left_out: members that are neither images nor labels are added to it, by kind.

    Raises:
        ValueError: if the file is not a tar or a compressed one.
    """
    _refuse_compressed(tar)
    members = _Members({}, {})
    try:
        with tarfile.open(tar, "r:") as content:
            if not _sort(content, members, left_out):
                message = f"it ends after {len(members.images)} images without the mark of its end"
                fault("tars cut short", f"{tar} is cut short: {message}")
            for key in sorted(members.images.keys() ^ members.labels.keys()):
                alone, lacks = (
                    (members.images[key], "label") if key in members.images else (members.labels[key], "image")
                )
                fault(f"no {lacks}", f"{tar}: {printable(alone.name)} has no {lacks} next to it")
            found = []
            for key in members.images.keys() & members.labels.keys():
                try:
                    label = _label(content, members.labels[key])
                except (ValueError, tarfile.ReadError) as error:
                    fault("no class number", f"{tar}: {error}")
                    continue
                image = members.images[key]
                found.append(TarMember(printable(image.name), label, image.offset_data, image.size))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{tar} is not a whole, plain tar: {error}") from error
    return sorted(found, key=lambda member: member.offset)


def ends_whole(tar: tarfile.TarFile) -> bool:
    """Return whether all members of a plain tar have been read: zeros mark its end.

    tarfile takes the end of the file, and a broken header, for the end of the archive.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    return tar.fileobj.read(RECORD) == bytes(RECORD)


def _refuse_compressed(tar: Path) -> None:
    with tar.open("rb") as content:
        start = content.read(8)
    for mark, name in COMPRESSED.items():
        if start.startswith(mark):
            raise ValueError(f"{tar} is compressed ({name}): images are read in any order, so unpack it to a plain tar")


def _sort(content: tarfile.TarFile, members: _Members, left_out: Counter[str]) -> bool:
    """Tell images from labels, and return whether the tar is whole."""
    try:
        for member in content:
            _take(member, members, left_out)
    except tarfile.ReadError:
        return False
    return ends_whole(content)


def _take(member: tarfile.TarInfo, members: _Members, left_out: Counter[str]) -> None:
    key, suffix = _split(member.name)
    if member.isdir():
        return
    # Tools without pax support unpack its headers as files.
    if any(map(_is_hidden, member.name.split("/"))):
        left_out["hidden"] += 1
    elif suffix not in suffixes() and suffix not in LABELS:
        left_out[suffix or "no suffix"] += 1
    elif not member.isfile() or member.issparse():
        left_out["links and sparse files"] += 1
    elif suffix in LABELS:
        if key not in members.labels or _rank(member) <= _rank(members.labels[key]):
            members.labels[key] = member
    else:
        # As when a tar is unpacked, a later member takes the place of an earlier one.
        if key in members.images:
            left_out["images of a name that comes again"] += 1
        members.images[key] = member


def _is_hidden(part: str) -> bool:
    return part not in (".", "..") and (is_hidden(part) or part.startswith("PaxHeader"))


def _split(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{suffix}".lower()


def _rank(member: tarfile.TarInfo) -> int:
    return LABELS.index(_split(member.name)[1])


def _label(content: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = content.extractfile(member)
    text = file.read().decode(errors="replace").strip() if file else ""
    found: object = text
    try:
        if member.name.lower().endswith(".json"):
            entries = json.loads(text)
            found = next(entries[key] for key in JSON_KEYS if key in entries)
        return int(str(found))  # int alone would cut off what follows a point
    except (ValueError, TypeError, StopIteration, RecursionError) as error:
        message = f"{printable(member.name)} does not hold a class number: got {str(found)[:40]!r}"
        raise ValueError(message) from error
