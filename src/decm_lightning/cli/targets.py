"""Check the device and the output path of a command before anything is loaded."""

from pathlib import Path

import torch
from PIL import Image

from decm_lightning.files import check_writable

KINDS = "out must be a folder or a .png file"


def check_device(name: str) -> torch.device:
    """Return the device of this name if this machine has it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error


def check_out(out: str) -> Path:
    """Return the path of a folder or .png file after checking that it can be written. Nothing is created."""
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
        check_writable(place)
    except OSError as error:
        raise ValueError(f"{KINDS} that can be written: got {out} ({place}: {error.strerror})") from error
    return path


def is_grid(out: Path) -> bool:
    """Return whether the images are written as a grid into one .png file, rather than into a folder."""
    return out.suffix.lower() == ".png"
