"""Read webdataset tars: all members in order, and a message for each damaged place.

Hugging Face's `datasets` silently stops at a damaged header or between concatenated tars. It rejects a whole folder
because of one incomplete pair, duplicate name, second image format or text that is not UTF-8. This reader does not.
"""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from decm_lightning.files import describe_unreadable
from decm_lightning.image_listing import printable

RECORD = 512
CHUNK = 1 << 20
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class TarMember:
    """A member of a tar: its path, the offset and length of its bytes in the uncompressed tar, and those if requested.

    Links, devices and sparse files are not files.

    Example:
        >>> member = TarMember("train/0001.seg.PNG", is_file=True, offset=512, length=0)
        >>> member.key, member.suffix
        ('train/0001', '.seg.png')
    """

    name: str
    is_file: bool
    offset: int
    length: int
    content: bytes = b""

    @property
    def key(self) -> str:
        """The path up to the first dot of the file name: webdataset's key, shared by all members of a sample."""
        folder, slash, last = self.name.rpartition("/")
        return f"{folder}{slash}{last.partition('.')[0]}"

    @property
    def suffix(self) -> str:
        """The rest of the name after the key, in lower case with its dot; "" if there is none."""
        return self.name.removeprefix(self.key).lower()


def read_members(file: Path, is_requested: Callable[[str], bool]) -> Iterator[TarMember | str]:
    """Yield the members of a plain or compressed tar, except folders, and a message for each damaged place.

    A damaged header loses only its own member: reading resumes at the next one. Concatenated tars are read to the end.
    For a tar that is cut short, the last item is a message that says so. Contents are read of members whose suffix
    `is_requested`.
    """
    end, last = 0, ""
    try:
        # ignore_zeros skips damaged headers, which would otherwise end the archive.
        with tarfile.open(file, "r:*", ignore_zeros=True) as tar:
            for info in tar:
                if lost := _lost_bytes(tar, end, info.offset):
                    yield f"is damaged ({lost} bytes before {printable(info.name)} are lost)"
                if not info.isdir():
                    yield _member(tar, info, is_requested)
                end, last = tar.offset, printable(info.name)
            if what := _end_error(tar, end, last):
                yield what
    except DAMAGE as error:
        after = f"after {last}: {error}" if last else describe_unreadable(file, text=True) or str(error)
        yield f"is cut short or not a tar ({after})".replace("\n", " ")


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, is_requested: Callable[[str], bool]) -> TarMember:
    is_file = info.isfile() and not info.issparse()
    member = TarMember(info.name, is_file, info.offset_data, info.size)
    content = tar.extractfile(info) if is_file and is_requested(member.suffix) else None
    return replace(member, content=content.read()) if content else member


def _lost_bytes(tar: tarfile.TarFile, start: int, stop: int) -> int:
    """Return the number of bytes between two positions; 0 if they are all zero, as between concatenated tars."""
    return stop - start if stop > start and any(map(any, _chunks(tar, start, stop))) else 0


def _end_error(tar: tarfile.TarFile, end: int, last: str) -> str:
    """Describe what is wrong after the last member; return "" if nothing is. Zeros mark the end of a tar."""
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
