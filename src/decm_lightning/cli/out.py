"""Where a command was told to write pictures."""

from pathlib import Path
from tempfile import TemporaryFile

from PIL import Image

KINDS = "out must be a folder or a .png file"


def checked_out(out: str) -> Path:
    """Return the path of a folder or a .png file that can be written; nothing is made yet.

    Raises:
        ValueError: if it is a file of another kind, or cannot be written.
    """
    if not out:
        raise ValueError(f"{KINDS}: got ''")
    path, suffix = Path(out), Path(out).suffix.lower()
    if suffix != ".png" and suffix in Image.registered_extensions():
        raise ValueError(f"{KINDS}: got {out}")
    if suffix == ".png" and path.is_dir():
        raise ValueError(f"{KINDS}: {out} is a folder")
    place = path.parent if suffix == ".png" else path
    while not place.exists():
        if place.is_symlink():
            raise ValueError(f"{KINDS}: {place} is a link to {place.readlink()}, which does not exist")
        place = place.parent
    try:
        # Permissions do not tell all, such as of a disk that is full or mounted to be read.
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{KINDS} that can be written: got {out} ({place}: {error.strerror})") from error
    return path
