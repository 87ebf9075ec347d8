"""Small sources of text-image pairs for tests."""

import io
import tarfile
from pathlib import Path

from PIL import Image

from decm_lightning.data.pairs.cache import PreparedPairs, prepare
from decm_lightning.data.pairs.pair import summary


def png(level: int) -> bytes:
    """Return the bytes of a small gray image."""
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(content, "png")
    return content.getvalue()


def write_images(folder: Path, count: int) -> None:
    """Write 0.png, 1.png ... with gray levels 0, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))


def write_tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    """Write a tar of these members."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def pairs_tar(file: Path, rows: range, mode: str = "w") -> Path:
    """Write a tar of pairs 0.png, 0.txt, 1.png ... with gray levels 0, 1, ..."""
    members = {}
    for row in rows:
        members |= {f"{row}.png": png(row), f"{row}.txt": f"level {row}".encode()}
    return write_tar(file, members, mode)


def read(source: Path, column: str | None = None) -> PreparedPairs:
    """Prepare pairs of 4 x 4 pixels, stored outside of the source."""
    return prepare(source, source.parent / "cache", 4, column, 2000)


def levels(prepared: PreparedPairs) -> list[int]:
    """Return the gray level of each image, which must be uniform."""
    first = prepared.images[:, 0, 0, 0]
    assert (prepared.images == first[:, None, None, None]).all()
    return first.tolist()


def error_summary(prepared: PreparedPairs) -> str:
    """Return the summary of the errors."""
    return summary("source", len(prepared.captions), prepared.errors)
