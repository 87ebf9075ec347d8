"""Text-image pairs of webdataset tars."""

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from decm_lightning.data.pairs.pair import IMAGES, DataError, Pair, caption_of
from decm_lightning.data.tars import RECORD, end_fault, lost_bytes
from decm_lightning.files import describe_unreadable

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
CAPTIONS = (".txt", ".json")
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


def read_tar(file: Path, column: str | None) -> Iterator[Pair | DataError]:
    """Yield the pairs of a webdataset tar: neighbors of one name up to its first dot, an image and .txt or .json.

    With a `column`, the caption is that of the .json file; without one, a .txt file comes first.

    As in webdataset, members without a suffix or without a name before it are skipped (`README`, `.hidden`), as are
    other members of a complete pair (`a.cls`, `a.mask.png`). Members of a name that has neither image nor caption are
    errors (`photo.v1.jpg` with `photo.v1.txt`, whose suffixes start at the first dot), as is the second of one name
    and suffix, and a link. A damaged place is one error, and reading resumes at the next member. A tar that is cut
    short is one error, and what stands before the cut is read.
    """
    # endswith, not Path.suffix: of "a.tar.gz" the stem is "a".
    ending = next(ending for ending in sorted(TARS, key=len, reverse=True) if file.name.lower().endswith(ending))
    group = _Group(file, file.name[: -len(ending)], column)
    end = 0
    try:
        # ignore_zeros skips damaged headers, which would otherwise end the archive.
        with tarfile.open(file, "r:*", ignore_zeros=True) as tar:
            for member in tar:
                if lost := lost_bytes(tar, end, member.offset):
                    yield from group.finish()
                    yield DataError(str(file), f"is damaged ({lost} bytes before {member.name} are lost)", None)
                yield from group.add(tar, member)
                end = member.offset_data + (member.size + RECORD - 1) // RECORD * RECORD
            yield from group.finish()
            if what := end_fault(tar, end, group.name):
                yield DataError(str(file), what, None)
    except DAMAGE as error:
        yield from group.finish()
        after = f"after {group.name}: {error}" if group.name else describe_unreadable(file, text=True) or str(error)
        yield DataError(str(file), f"is cut short or not a tar ({after})".replace("\n", " "), None)


class _Group:
    """Collect the members of one name, and yield their pair or errors."""

    def __init__(self, file: Path, stem: str, column: str | None) -> None:
        self.file = file
        self.stem = stem
        self.column = column
        self.name = ""
        self.parts: dict[str, bytes] = {}

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[Pair | DataError]:
        path = PurePosixPath(member.name)
        stem, _, suffix = path.name.partition(".")
        if member.isdir() or not (stem and suffix):
            return
        name, suffix = str(path.parent / stem), f".{suffix.lower()}"
        if name != self.name:
            yield from self.finish()
            self.name = name
        place = f"{self.file}: {member.name}"
        if not member.isfile():
            yield DataError(place, "is a link or a device, not a file")
        elif suffix in self.parts:
            yield DataError(place, "is there twice")
        else:
            content = tar.extractfile(member) if suffix in IMAGES + CAPTIONS else None
            self.parts[suffix] = content.read() if content else b""

    def finish(self) -> Iterator[Pair | DataError]:
        parts, self.parts = self.parts, {}
        place = f"{self.file}: {self.name}"
        images = [suffix for suffix in parts if suffix in IMAGES]
        captions = [suffix for suffix in CAPTIONS if suffix in parts]
        if not images and not captions:
            what = "is neither image nor caption by what follows its first dot (expected .jpg, .png ...; .txt, .json)"
            yield from (DataError(place + suffix, what) for suffix in parts)
        elif not images:
            yield DataError(place + captions[0], "has no image (.jpg, .png or another format)")
        elif len(images) > 1:
            yield DataError(place + images[0], f"is one of several images of a name ({', '.join(images)})")
        elif not captions:
            yield DataError(place + images[0], f"has no caption ({', '.join(CAPTIONS)})")
        else:
            caption = self._caption(place, parts)
            if isinstance(caption, DataError):
                yield caption
            else:
                yield Pair(place + images[0], f"{self.stem}/{self.name}", parts[images[0]], caption)

    def _caption(self, place: str, parts: dict[str, bytes]) -> str | DataError:
        suffix = next(suffix for suffix in CAPTIONS if suffix in parts)
        if self.column is not None:
            if ".json" not in parts:
                return DataError(place + suffix, f"has no .json file (with the caption column {self.column!r})")
            suffix = ".json"
        try:
            text = parts[suffix].decode("utf-8-sig")
            if suffix == ".txt":
                return text
            values = json.loads(text)
        except UnicodeDecodeError:
            return DataError(place + suffix, "is not UTF-8")
        except (ValueError, RecursionError) as error:
            return DataError(place + suffix, f"is not JSON ({error})")
        if not isinstance(values, dict):
            return DataError(place + suffix, "is not a JSON object")
        return caption_of(place + suffix, values, self.column)
