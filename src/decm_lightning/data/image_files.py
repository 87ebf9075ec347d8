"""Images with labels as files: a folder of class folders, or webdataset tars; read one by one as square RGB pixels."""

import glob
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from decm_lightning.data.tars import TarMember, tar_members

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")


class ImageFile(NamedTuple):
    """Where one image is, and its class.

    Args:
        name: under which it is sorted, named in errors, and counted in `fingerprint`.
        label: its class, at least 0.
        file: the file that holds it.
        offset: its first byte there.
        length: its bytes; -1 for the whole file.
    """

    name: str
    label: int
    file: str
    offset: int = 0
    length: int = -1


class ImageFiles:
    """All images of a source, in an order that depends on their names alone.

    In a folder of class folders (ImageNet's layout) the classes are numbered by their sorted names. In tars each image
    has its class beside it, as name.cls, name.json ({"label": 3} or {"cls": 3}) or name.txt.

    Args:
        source: a folder of class folders, a folder of .tar files, one .tar file, or a pattern such as "train-*.tar".
        num_classes: labels must be below it; None for the number of class folders, or one more than the largest label.

    Raises:
        FileNotFoundError: if there is no such source, or no image in it.
        ValueError: naming the file or member that is cut short, has no label or a label outside of the classes.
    """

    def __init__(self, source: str, num_classes: int | None = None) -> None:
        self.source = source
        tars = _tars(source)
        files, self.num_classes = _from_tars(tars, num_classes) if tars else _from_folder(source, num_classes)
        if not files:
            raise FileNotFoundError(f"no image in {source}: expected {', '.join(SUFFIXES)} in class folders or tars")
        self.files: Sequence[ImageFile] = files

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names and labels in order."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\t{file.label}\n".encode())
        return digest.hexdigest()

    def read(self, number: int, size: int) -> UInt8[Tensor, "3 h w"]:
        """Return the pixels of an image, cropped to size x size.

        Raises:
            ValueError: naming the image, if it is broken.
        """
        image = self.files[number]
        try:
            with open(image.file, "rb") as file:
                file.seek(image.offset)
                content = io.BytesIO(file.read(image.length))
            # Other formats of PIL's run code of their own, or have no pixels.
            with Image.open(content, formats=FORMATS) as opened:
                pixels = center_crop(opened.convert("RGB"), size)
        # A broken image fails in any way.
        except Exception as error:
            raise ValueError(f"{image.name} is no whole image: {what_pil_says(error)}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def what_pil_says(error: Exception) -> str:
    """Return PIL's message on a broken image: its first line, without the address of the image in memory."""
    return str(error).partition("\n")[0].partition(" <_io")[0]


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Return the middle size x size pixels of an image whose shorter side is scaled to `size`.

    As ADM does (arXiv 2105.05233), whose reference statistics are of such images: halved by box averages while it is
    at least twice as large, then resized bicubically. The orientation in a photo's EXIF is not looked at.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _tars(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        return sorted(tar for tar in path.glob("*.tar") if tar.is_file())
    if path.is_file():
        return [path]
    found = sorted(tar for tar in map(Path, glob.glob(source)) if tar.is_file())
    if not found:
        raise FileNotFoundError(f"no folder or file {source}: give a folder of class folders, or tars")
    return found


def _from_folder(source: str, num_classes: int | None) -> tuple[list[ImageFile], int]:
    folders = sorted(path for path in Path(source).iterdir() if path.is_dir() and not path.name.startswith("."))
    files = []
    for label, folder in enumerate(folders):
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not images:
            raise FileNotFoundError(f"no image in the class folder {folder}: expected {', '.join(SUFFIXES)}")
        files += [ImageFile(f"{folder.name}/{path.name}", label, str(path)) for path in images]
    if num_classes not in (None, len(folders)):
        raise ValueError(f"{source} has {len(folders)} class folders: num_classes is {num_classes}")
    return files, len(folders)


def _from_tars(tars: Sequence[Path], num_classes: int | None) -> tuple[list[ImageFile], int]:
    files = []
    for tar in tars:
        for member in tar_members(tar, SUFFIXES):
            _check_label(tar, member, num_classes)
            name = f"{tar.name}: {member.name}"
            files.append(ImageFile(name, member.label, str(tar), member.offset, member.length))
    return files, num_classes or max((file.label for file in files), default=-1) + 1


def _check_label(tar: Path, member: TarMember, num_classes: int | None) -> None:
    if member.label < 0 or (num_classes is not None and member.label >= num_classes):
        limit = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        raise ValueError(f"{tar}: the label of {member.name} is {member.label}: expected {limit}")
