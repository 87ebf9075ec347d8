"""Read text-image pairs from webdataset tars."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from decm_lightning.data.pairs.pair import IMAGES, DataError, Pair, caption_of
from decm_lightning.data.tars import TarMember, read_members

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
CAPTIONS = (".txt", ".json")


def read_tar(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    """Yield the pairs of a webdataset tar.

    A pair consists of consecutive members whose names agree up to the first dot: an image and a .txt or .json file.
    With a `column`, the caption comes from the .json file. Otherwise a .txt file takes precedence.

    As in webdataset, members without a suffix or without a name before it are skipped (`README`, `.hidden`), and so are
    other members of a complete pair (`a.cls`, `a.mask.png`). These are errors: members of a name with neither
    an image nor a caption (`photo.v1.jpg` with `photo.v1.txt`, whose suffixes start at the first dot), a second member
    with the same name and suffix, and links. A damaged place is one error, and reading resumes at the next member.
    """
    # Path.suffix of "a.tar.gz" is ".gz", but the stem must be "a".
    ending = next(ending for ending in sorted(TARS, key=len, reverse=True) if file.name.lower().endswith(ending))
    prefix, key = file.name[: -len(ending)], ""
    parts: dict[str, TarMember] = {}
    for member in read_members(file, lambda suffix: suffix in IMAGES + CAPTIONS):
        if isinstance(member, str):
            yield from _pairs(file, prefix, key, parts, column)
            parts = {}
            yield DataError(str(file), member, None)
            continue
        if not member.suffix or member.key.endswith("/") or not member.key:
            continue
        if (name := str(PurePosixPath(member.key))) != key:
            yield from _pairs(file, prefix, key, parts, column)
            key, parts = name, {}
        if not member.is_file:
            yield DataError(f"{file}: {member.name}", "is a link or a device, not a file")
        elif member.suffix in parts:
            yield DataError(f"{file}: {member.name}", "is in the tar twice")
        else:
            parts[member.suffix] = member
    yield from _pairs(file, prefix, key, parts, column)


def _pairs(
    file: Path, prefix: str, key: str, parts: dict[str, TarMember], column: str | None
) -> Iterator[Pair | DataError]:
    """Yield the pair of the members with one key, which are given by suffix, or their errors."""
    place = f"{file}: {key}"
    images = [suffix for suffix in parts if suffix in IMAGES]
    captions = [suffix for suffix in CAPTIONS if suffix in parts]
    if not images and not captions:
        what = "is neither an image nor a caption (its suffix after the first dot is not .jpg, .png ..., .txt or .json)"
        yield from (DataError(place + suffix, what) for suffix in parts)
    elif not images:
        yield DataError(place + captions[0], "has no image (.jpg, .png or another format)")
    elif len(images) > 1:
        yield DataError(place + images[0], f"is one of several images with the same name ({', '.join(images)})")
    elif not captions:
        yield DataError(place + images[0], f"has no caption ({', '.join(CAPTIONS)})")
    else:
        caption = _caption(place, parts, column)
        if isinstance(caption, DataError):
            yield caption
        else:
            yield Pair(place + images[0], f"{prefix}/{key}", parts[images[0]].content, caption)


def _caption(place: str, parts: dict[str, TarMember], column: str | None) -> str | DataError:
    suffix = next(suffix for suffix in CAPTIONS if suffix in parts)
    if column is not None:
        if ".json" not in parts:
            return DataError(place + suffix, f"has no .json file (for the caption column {column!r})")
        suffix = ".json"
    try:
        text = parts[suffix].content.decode("utf-8-sig")
        values = text if suffix == ".txt" else json.loads(text)
    except UnicodeDecodeError:
        return DataError(place + suffix, "is not UTF-8")
    except (ValueError, RecursionError) as error:
        return DataError(place + suffix, f"is not JSON ({error})")
    if suffix == ".txt":
        return text
    return caption_of(place + suffix, values, column)
