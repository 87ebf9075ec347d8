"""Labeled images in class folders or webdataset tars, read one at a time as square RGB pixels."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from decm_lightning.data.images.class_tars import class_images
from decm_lightning.errors import check_at_least
from decm_lightning.image_listing import Listing, counted, is_hidden, list_files, printable
from decm_lightning.image_reader import Location, read_image, suffixes

TAR = ".tar"
OnError = Literal["raise", "skip"]


class ImageFile(NamedTuple):
    """One image, its class number and where its bytes are stored, in a tar or ("") in a class folder.

    The name is unique in the source, with escapes for unprintable characters. Error messages use it, and the noise of
    the latent depends on it.
    """

    name: str
    label: int
    place: Location
    tar: str = ""

    @property
    def order(self) -> tuple[str, ...]:
        """The sort key of the image: the parts of its path, or its tar and the position in it."""
        return (self.tar, f"{self.place.offset:020d}") if self.tar else tuple(self.name.split("/"))


class ImageFiles:
    """All images of a source, sorted by name, or by tar and position in the tar.

    In a folder of class folders (ImageNet's layout), classes are numbered by their sorted names, and class folders may
    have subfolders. A folder with images but no class folders is one class. In tars, the class of each image is stored
    next to it, as name.cls, name.json ({"label": 3} or {"cls": 3}) or name.txt. A folder is read as tars if a tar is at
    its top level or all its files are tars. Images have one of the suffixes in `image_reader.suffixes`. Links are
    followed, and hidden files are left out.

    Args:
        source: a folder of class folders or images, a folder of .tar files, one .tar file, or a pattern such as
            "train-*.tar".
        num_classes: labels must be below it; None for the number of class folders, or for the largest label plus 1.
        on_error: "raise", or "skip" to leave out images in tars without a valid label, and the rest of a tar that is
            cut short. They are counted.

    Attributes:
        files: the images.
        class_names: names of the class folders; the numbers of classes in tars.
        left_out: number of files that were left out, by kind.

    Raises:
        FileNotFoundError: if the source does not exist, has no image, or has a class folder without an image.
        ValueError: if num_classes is below 1 or is not the number of class folders, a tar is damaged, or an image has
            no valid label. The message names the file or member.
    """

    def __init__(self, source: str, num_classes: int | None = None, on_error: OnError = "raise") -> None:
        check_at_least(1, num_classes=num_classes)
        self.source = source
        self.on_error = on_error
        self.left_out: Counter[str] = Counter()
        self._tar_times: dict[str, str] = {}
        path = Path(source)
        listing = list_files(path, suffixes() | {TAR}) if path.is_dir() else None
        tars = _tars_of(source, listing)
        if tars:
            self.files = self._from_tars(tars, num_classes)
            self.num_classes = num_classes or max((file.label for file in self.files), default=-1) + 1
            self.class_names = tuple(map(str, range(self.num_classes)))
        else:
            assert listing is not None
            classes = [""] if _is_flat(listing) else listing.folders
            self.files = self._from_folder(path, listing, classes)
            self.num_classes = len(classes)
            self.class_names = tuple(printable(name or path.resolve().name) for name in classes)
            if num_classes not in (None, self.num_classes):
                raise ValueError(f"{source} has {self.num_classes} class folders: num_classes is {num_classes}")
        if listing is not None:
            self._count_others(listing, bool(tars))
        if not self.files:
            found = f"; it has {counted(self.left_out)}" if self.left_out else ""
            raise FileNotFoundError(f"no image in {source}: expected images in class folders or tars{found}")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def check_output(self, folder: str) -> None:
        """Refuse an output folder that would become a class folder or change one."""
        if not self.files[0].tar and Path(folder).resolve().is_relative_to(Path(self.source).resolve()):
            source = f"the image folder {printable(self.source)}, where each folder is a class"
            raise ValueError(f"{printable(folder)} is inside {source}: set --out to a folder outside of it")

    def read(self, number: int, size: int) -> UInt8[Tensor, "3 h w"]:
        """Return the pixels of an image, center-cropped to size x size."""
        image = self.files[number]
        try:
            pixels = center_crop(read_image(image.place.read()).convert("RGB"), size)
        except OSError as error:
            raise ValueError(f"{image.name} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{image.name} {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def identity(self, image: ImageFile) -> str:
        """Return name, label, size and modification time of an image. The result changes when the image is replaced."""
        file = image.place.file
        # Disk access for each image of a tar would be slow.
        changed = self._tar_times[file] if image.tar else _size_and_time(file)
        return f"{image.name}\t{image.label}\t{image.place.offset}\t{image.place.length}\t{changed}"

    def _from_folder(self, root: Path, listing: Listing, classes: Sequence[str]) -> list[ImageFile]:
        labels = {folder: label for label, folder in enumerate(classes)}
        images = [parts for parts in listing.files if not parts[-1].lower().endswith(TAR)]
        inside = [parts for parts in images if _class_folder(parts) in labels]
        empty = sorted(labels.keys() - set(map(_class_folder, inside)))
        if empty:
            more = f" (and in {len(empty) - 1} others)" if len(empty) > 1 else ""
            raise FileNotFoundError(
                f"no image in the class folder {printable(root / empty[0])}{more}: expected .jpg, .png, ..."
            )
        files = [
            ImageFile(
                "/".join(map(printable, parts)), labels[_class_folder(parts)], Location(os.path.join(root, *parts))
            )
            for parts in inside
        ]
        return sorted(files, key=lambda file: file.order)

    def _from_tars(self, tars: dict[str, Path], num_classes: int | None) -> list[ImageFile]:
        files = []
        limit = "at least 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        for name, tar in sorted(tars.items()):
            self._tar_times[str(tar)] = _size_and_time(str(tar))
            for member in class_images(tar, self._report, self.left_out):
                if member.label < 0 or (num_classes is not None and member.label >= num_classes):
                    message = f"{tar}: the label of {member.name} is {member.label}: expected {limit}"
                    self._report(f"label not {limit}", message)
                    continue
                place = Location(str(tar), member.offset, member.length)
                files.append(ImageFile(f"{name}: {member.name}", member.label, place, name))
        return files

    def _report(self, kind: str, message: str) -> None:
        if self.on_error == "raise":
            raise ValueError(message)
        self.left_out[kind] += 1

    def _count_others(self, listing: Listing, are_tars: bool) -> None:
        self.left_out += listing.left_out
        for parts in listing.files:
            is_tar = parts[-1].lower().endswith(TAR)
            if is_tar and not are_tars:
                self.left_out[TAR] += 1
            elif not is_tar and are_tars:
                self.left_out["images next to tars"] += 1
            elif not is_tar and len(parts) == 1 and not _is_flat(listing):
                self.left_out["images outside of class folders"] += 1


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Scale the shorter side of an image to `size` and return the central size x size pixels.

    This is the crop of ADM (arXiv 2105.05233) and of its reference statistics: the image is halved by box averages
    while it is at least twice as large, then resized bicubically. A strip longer than 16 times its width is cropped to
    its middle first.
    """
    # Enlarging a whole strip that is one pixel wide would take gigabytes.
    longest = 16 * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def _is_flat(listing: Listing) -> bool:
    """Return whether a folder has images, but no class folders with images."""
    return bool(listing.files) and all(len(parts) == 1 for parts in listing.files)


def _class_folder(parts: tuple[str, ...]) -> str:
    return parts[0] if len(parts) > 1 else ""


def _tars_of(source: str, listing: Listing | None) -> dict[str, Path]:
    """Return the tars of a source by name; empty if it is a folder of class folders."""
    path = Path(source)
    if listing is not None:
        found = [parts for parts in listing.files if parts[-1].lower().endswith(TAR)]
        # Tars in subfolders are not the source if there are images, too.
        are_source = any(len(parts) == 1 for parts in found) or len(found) == len(listing.files)
        return {"/".join(map(printable, parts)): path.joinpath(*parts) for parts in found if are_source}
    if path.is_file():
        return {printable(path.name): path}
    matching = [file for file in glob.glob(source) if os.path.isfile(file) and not is_hidden(os.path.basename(file))]
    if not matching:
        raise FileNotFoundError(f"no folder or file {source}: expected a folder of class folders, or tars")
    common = os.path.commonpath([os.path.dirname(file) for file in matching])
    return {printable(os.path.relpath(file, common or ".")): Path(file) for file in matching}


def _size_and_time(file: str) -> str:
    found = os.stat(file)
    return f"{found.st_size}\t{found.st_mtime_ns}"
