"""Reference statistics: real images, or moments of their Inception features, read from a file or folder."""

import hashlib
import logging
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from einops import rearrange
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from decm_lightning.files import describe_unreadable, file_sha256
from decm_lightning.image_listing import broken, counted, list_files, printable
from decm_lightning.image_reader import Location, read_image, read_modes, suffixes
from decm_lightning.metrics.frechet import Moments

log = logging.getLogger(__name__)
IMAGES = "arr_0"
# The names that ADM uses for the moments of pooled and of spatial features.
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
EXPECTED = f"expected mu and sigma, images {IMAGES}, or both"


class Images(Protocol):
    """Real images on disk."""

    shape: tuple[int, int, int]
    """(c, h, w) of each image."""

    def __len__(self) -> int:
        """Return their number, above 0."""

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        """Yield the images of each part, uint8 (n, c, h, w). Parts must be in ascending order and not overlap."""


@dataclass(frozen=True)
class Reference:
    """Real images, moments of their Inception features by view ("pool", "spatial"), or both."""

    path: Path
    moments: Mapping[str, Moments]
    images: Images | None

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file, or of all names and contents in the folder, in order."""
        if not self.path.is_dir():
            return file_sha256(self.path)
        digest = hashlib.sha256()
        for file in _images(self.path)[0]:
            digest.update(os.fsencode(file.relative_to(self.path)))
            digest.update(file_sha256(file).encode())
        return digest.hexdigest()


def read(path: str | Path) -> Reference:
    """Return the reference at `path`.

    Args:
        path: an .npz file with `mu` (2048) and `sigma` (2048, 2048) of Inception's pooled features, `mu_s` and
            `sigma_s` (2023) of its spatial ones, or images `arr_0`, uint8 (n, h, w, c), such as ADM's
            VIRTUAL_imagenet256_labeled.npz (all of these) or FACM's fid-50k-256.npz (mu and sigma); or a folder of
            images of one size, including subfolders.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the content is anything else.
    """
    path = Path(path)
    if path.is_dir():
        return Reference(path, {}, FolderImages(path))
    if not path.is_file():
        raise FileNotFoundError(f"no reference at {path}: {EXPECTED} in an .npz file, or a folder of images")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: {describe_unreadable(path) or 'not an .npz file'}: {EXPECTED}")
    with _named(path), np.load(path, allow_pickle=False) as content:
        moments = {view: _moments(content, keys, path) for view, keys in MOMENTS.items() if keys[0] in content}
        has_images = IMAGES in content
        if not moments and not has_images:
            raise ValueError(f"{path} has {', '.join(content.files) or 'no arrays'}: {EXPECTED}")
    return Reference(path, moments, NpzImages(path) if has_images else None)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file name to errors of numpy and zipfile."""
    try:
        yield
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is damaged or not an .npz file of numbers ({error}): create it again") from error


class NpzImages:
    """The images `arr_0` of an .npz file, uint8 (n, h, w, 1 or 3), read as a stream because ADM's files have 2 GB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _named(path), zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            self.count, height, width, channels = self._header(stream)
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        """Yield the images of each part."""
        size = int(np.prod(self.shape))
        with _named(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            self._header(stream)
            position = 0
            for part in parts:
                stream.seek((part.start - position) * size, 1)
                position = part.stop
                content = stream.read(len(part) * size)
                if len(content) < len(part) * size:
                    raise ValueError(f"{self.path}: {IMAGES} ends before image {part.stop - 1}: is the file complete?")
                pixels = np.frombuffer(content, np.uint8).reshape(len(part), *self.shape[1:], self.shape[0])
                yield rearrange(torch.from_numpy(pixels.copy()), "n h w c -> n c h w")

    def _header(self, stream: IO[bytes]) -> tuple[int, ...]:
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, by_columns, dtype = np.lib.format.read_array_header_2_0(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or by_columns or not shape[0]:
            raise ValueError(f"{self.path}: {IMAGES} must be uint8 (n, h, w, 1 or 3): got {dtype} {shape}")
        return shape


class FolderImages:
    """The images of a folder and its subfolders in the formats of `image_reader.formats`, ordered by name.

    They have one channel if all are gray, otherwise three. Other files are skipped; one warning counts them.
    """

    def __init__(self, folder: Path) -> None:
        self.files, left_out = _images(folder)
        if left_out:
            rank_zero_only(log.warning)("skipped in %s: %s", folder, counted(left_out))
        if not self.files:
            found = f"; it has {counted(left_out)}" if left_out else ""
            raise ValueError(f"no images in {folder}: expected .jpg, .png, ...{found}")
        modes = dict(zip(self.files, read_modes([Location(str(file)) for file in self.files]), strict=True))
        faults = {printable(file): str(error) for file, error in modes.items() if isinstance(error, ValueError)}
        if faults:
            raise ValueError(broken(faults))
        self.mode = "RGB" if "RGB" in modes.values() else "L"
        self.size = read_image(self.files[0]).size
        self.shape = (len(self.mode), self.size[1], self.size[0])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def batches(self, parts: Sequence[range]) -> Iterator[Tensor]:
        """Yield the images of each part."""
        for part in parts:
            pixels = torch.empty(len(part), *self.shape[1:], self.shape[0], dtype=torch.uint8)
            for row, number in enumerate(part):
                pixels[row] = self._read(self.files[number]).reshape(pixels.shape[1:])
            yield rearrange(pixels, "n h w c -> n c h w")

    def _read(self, file: Path) -> Tensor:
        image = read_image(file)
        if image.size != self.size:
            first = f"{printable(self.files[0])} {self.size[0]} x {self.size[1]}"
            sizes = f"{image.size[0]} x {image.size[1]}, and {first}"
            raise ValueError(f"images must have the same size: {printable(file)} is {sizes}")
        return torch.from_numpy(np.array(image.convert(self.mode)))


def _images(folder: Path) -> tuple[list[Path], Counter[str]]:
    listing = list_files(folder, suffixes())
    return [folder.joinpath(*parts) for parts in listing.files], listing.left_out


def _moments(content: Mapping[str, np.ndarray], keys: tuple[str, str], path: Path) -> Moments:
    mu, sigma = keys
    if sigma not in content:
        raise ValueError(f"{path} has {mu} but lacks {sigma}: {EXPECTED}")
    # For a member that is not an array, numpy returns bytes.
    arrays = [np.asarray(content[key]) for key in keys]
    if not all(array.dtype.kind in "fiu" for array in arrays):
        raise ValueError(f"{path}: {mu} and {sigma} must be real numbers: got {arrays[0].dtype}, {arrays[1].dtype}")
    mean, covariance = (torch.from_numpy(np.array(array, dtype=np.float64)) for array in arrays)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        found = f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"{path}: {mu} must be (d,) and {sigma} (d, d): {found}")
    fault = ""
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        fault = f"{mu} and {sigma} must be finite"
    elif not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.abs().max())):
        fault = f"{sigma} must be symmetric"
    elif covariance.diagonal().min() < 0:
        fault = f"the diagonal of {sigma} has negative variances"
    if fault:
        raise ValueError(f"{path}: {fault}: create the file again")
    return Moments(mean, covariance)
