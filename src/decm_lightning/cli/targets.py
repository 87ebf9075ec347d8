"""Where a command computes and where it writes images, checked before anything is loaded."""

from pathlib import Path
from tempfile import TemporaryFile

import torch
from PIL import Image

KINDS = "out must be a folder or a .png file"


def check_device(name: str) -> torch.device:
    """Return a device.

    Raises:
        ValueError: if this machine does not have it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error


def check_out(out: str) -> Path:
    """Return the path of a folder or a .png file that can be written; nothing is created yet.

    Raises:
        ValueError: if it is a file of another kind, or cannot be written.
    """
    if not out:
        raise ValueError(f"{KINDS}: got ''")
    path = Path(out)
    if not is_grid(path) and path.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"{KINDS}: got {out}")
    if is_grid(path) and path.is_dir():
        raise ValueError(f"{KINDS}: {out} is a folder")
    place = path.parent if is_grid(path) else path
    while not place.exists():
        if place.is_symlink():
            raise ValueError(f"{KINDS}: {place} is a link to {place.readlink()}, which does not exist")
        place = place.parent
    try:
        # A disk may be full or read-only whatever the permissions say.
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"{KINDS} that can be written: got {out} ({place}: {error.strerror})") from error
    return path


def is_grid(out: Path) -> bool:
    """Return whether images go into one .png file, rather than a folder with a file each."""
    return out.suffix.lower() == ".png"
