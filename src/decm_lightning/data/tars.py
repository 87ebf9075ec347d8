"""Webdataset tars by the positions of their members, and what is damaged between and after these."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from decm_lightning.files import describe_unreadable
from decm_lightning.image_listing import is_hidden, printable
from decm_lightning.image_reader import suffixes

LABELS = (".cls", ".json", ".txt")
JSON_KEYS = ("label", "cls")
RECORD = 512
CHUNK = 1 << 20
LARGEST = 2**63 - 1
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

    As in webdataset, files that have the same path up to the first dot of their name belong together. A damaged place
    costs the members in it, and tars that were joined are read to the end.

    Args:
        tar: the file.
        fault: called if the tar is damaged or cut short, if an image has no label or a label no image, and if a label
            is not a number. If it returns, what it was called for is left out.
        left_out: members that are neither images nor labels are added to it, by kind.

    Raises:
        ValueError: if the file is not a tar or a compressed one.
    """
    _refuse_compressed(tar)
    members = _Members({}, {})
    try:
        # ignore_zeros skips damaged headers, which would otherwise end the archive.
        with tarfile.open(tar, "r:", ignore_zeros=True) as content:
            for what in _sort(content, members, left_out):
                fault("damaged places in tars", f"{tar} {what}")
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
        raise ValueError(f"{tar} is not a whole, plain tar: {describe_unreadable(tar, text=True) or error}") from error
    return sorted(found, key=lambda member: member.offset)


def lost_bytes(tar: tarfile.TarFile, start: int, stop: int) -> int:
    """Return the number of bytes between two places, 0 if they are zeros, as between tars that were joined."""
    return stop - start if stop > start and any(map(any, _chunks(tar, start, stop))) else 0


def end_fault(tar: tarfile.TarFile, end: int, last: str) -> str:
    """Return what is wrong after the last member, "" if nothing is: zeros mark the end of a tar, and nothing follows.

    Args:
        tar: whose members have been read.
        end: the byte after the last member.
        last: the name of the last member; "" without one.
    """
    length, mark, damaged = 0, b"", False
    for chunk in _chunks(tar, end):
        mark = mark or chunk[:RECORD]
        length += len(chunk)
        damaged = damaged or any(chunk)
    if not end and damaged:
        return "is not a tar (no member can be read)"
    if damaged:
        return f"is damaged or cut short ({length} bytes after {last} are lost)"
    if mark != bytes(RECORD):
        return f"is cut short: it does not end as a tar (after {last or 'nothing'})"
    return ""


def _chunks(tar: tarfile.TarFile, start: int, stop: int | None = None) -> Iterator[bytes]:
    assert tar.fileobj is not None
    tar.fileobj.seek(start)
    while chunk := tar.fileobj.read(CHUNK if stop is None else min(CHUNK, stop - start)):
        yield chunk
        start += len(chunk)


def _refuse_compressed(tar: Path) -> None:
    with tar.open("rb") as content:
        start = content.read(8)
    for mark, name in COMPRESSED.items():
        if start.startswith(mark):
            raise ValueError(f"{tar} is compressed ({name}): images are read in any order, so unpack it to a plain tar")


def _sort(content: tarfile.TarFile, members: _Members, left_out: Counter[str]) -> Iterator[str]:
    """Tell images from labels, and yield what is wrong with the tar."""
    end, last = 0, ""
    try:
        for member in content:
            if lost := lost_bytes(content, end, member.offset):
                yield f"is damaged ({lost} bytes before {printable(member.name)} are lost)"
            _take(member, members, left_out)
            end, last = content.offset, printable(member.name)
    except tarfile.ReadError as error:
        yield f"is cut short after {last}: {error}"
        return
    if what := end_fault(content, end, last):
        yield what


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
    text = file.read().decode("utf-8-sig", errors="replace").strip() if file else ""
    found: object = text
    try:
        if member.name.lower().endswith(".json"):
            entries = json.loads(text)
            found = next(entries[key] for key in JSON_KEYS if key in entries)
        if abs(label := int(str(found))) > LARGEST:  # int alone would cut off what follows a point
            raise ValueError("beyond 64 bits")
        return label
    except (ValueError, TypeError, StopIteration, RecursionError) as error:
        message = f"{printable(member.name)} does not hold a class number: got {str(found)[:40]!r}"
        raise ValueError(message) from error
