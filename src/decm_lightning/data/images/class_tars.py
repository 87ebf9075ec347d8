"""Read images with class numbers from webdataset tars. The class is in name.cls, name.json or name.txt."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from decm_lightning.data.tars import TarMember, read_members
from decm_lightning.image_listing import is_hidden, printable
from decm_lightning.image_reader import suffixes

LABELS = (".cls", ".json", ".txt")
JSON_KEYS = ("label", "cls")
LARGEST = 2**63 - 1
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
Members = dict[str, TarMember]


class ClassImage(NamedTuple):
    """An image in a tar: its name, class, position and size in bytes."""

    name: str
    label: int
    offset: int
    length: int


def class_images(tar: Path, report: Callable[[str, str], None], left_out: Counter[str]) -> list[ClassImage]:
    """Return the images of an uncompressed tar with their class numbers, in the order of the tar.

    Members whose paths agree up to the first dot of the file name belong together, wherever they are in the tar.

    Args:
        tar: the file.
        report: receives the kind of an error and a message that names the file and member: the tar is damaged or cut
            short, an image has no label, a label has no image, or a label is not a number. If `report` returns, the
            image is left out.
        left_out: counts the members that are neither images nor labels, by kind.
    """
    _refuse_compressed(tar)
    images: Members = {}
    labels: Members = {}
    for member in read_members(tar, LABELS.__contains__):
        if isinstance(member, str):
            report("damaged places in tars", f"{tar} {member}")
        else:
            _sort(member, images, labels, left_out)
    for key in sorted(images.keys() ^ labels.keys()):
        alone, lacks = (images[key], "label") if key in images else (labels[key], "image")
        report(f"no {lacks}", f"{tar}: {printable(alone.name)} has no {lacks} next to it")
    found = []
    for key in images.keys() & labels.keys():
        try:
            label = _class_number(labels[key])
        except ValueError as error:
            report("no class number", f"{tar}: {error}")
            continue
        found.append(ClassImage(printable(images[key].name), label, images[key].offset, images[key].length))
    return sorted(found, key=lambda image: image.offset)


def _refuse_compressed(tar: Path) -> None:
    with tar.open("rb") as content:
        start = content.read(8)
    for mark, name in COMPRESSED.items():
        if start.startswith(mark):
            remedy = "decompress it to a plain tar, because images are read in random order"
            raise ValueError(f"{tar} is compressed ({name}): {remedy}")


def _sort(member: TarMember, images: Members, labels: Members, left_out: Counter[str]) -> None:
    suffix = member.suffix
    # Tools without pax support unpack its headers as files.
    if any(map(_is_hidden, member.name.split("/"))):
        left_out["hidden"] += 1
    elif suffix not in suffixes() and suffix not in LABELS:
        left_out[suffix or "no suffix"] += 1
    elif not member.is_file:
        left_out["links and sparse files"] += 1
    elif suffix in LABELS:
        if member.key not in labels or _rank(member) <= _rank(labels[member.key]):
            labels[member.key] = member
    else:
        # A later member replaces an earlier one, as it does when a tar is unpacked.
        if member.key in images:
            left_out["images with a duplicate name"] += 1
        images[member.key] = member


def _is_hidden(part: str) -> bool:
    return part not in (".", "..") and (is_hidden(part) or part.startswith("PaxHeader"))


def _rank(member: TarMember) -> int:
    return LABELS.index(member.suffix)


def _class_number(member: TarMember) -> int:
    text = member.content.decode("utf-8-sig", errors="replace").strip()
    value: object = text
    try:
        if member.suffix.endswith(".json"):
            entries = json.loads(text)
            value = next(entries[key] for key in JSON_KEYS if key in entries)
        if abs(label := int(str(value))) > LARGEST:  # int alone would truncate a float
            raise ValueError("beyond 64 bits")
        return label
    except (ValueError, TypeError, StopIteration, RecursionError) as error:
        message = f"{printable(member.name)} does not hold a class number: got {str(value)[:40]!r}"
        raise ValueError(message) from error
