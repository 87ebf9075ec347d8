"""What generated images are measured against, from a file: moments of Inception features, images, or both."""

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
# ADM's names: the pooled features and the spatial ones.
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
EXPECTED = f"expected mu and sigma, images {IMAGES}, or both"


class Images(Protocol):
    """Real images on disk."""

    def __len__(self) -> int:
        """Return their number, above 0."""

    def batches(self, shares: Sequence[range]) -> Iterator[Tensor]:
        """Yield the images of each share, uint8 (n, c, h, w); shares go upwards and do not meet."""


@dataclass(frozen=True)
class Reference:
    """Real images, or what is known of them.

    Args:
        path: where it was read from.
        moments: of Inception features, by view: "pool", "spatial".
        images: None if there are none.
    """

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
            images of one size, sub-folders included.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is of another form.
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
    """Name the file in what numpy and zipfile raise about a damaged one."""
    try:
        yield
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is damaged or not an .npz file of numbers ({error}): make it again") from error


class NpzImages:
    """The images of an .npz file, read as a stream: ADM's are 2 GB.

    Args:
        path: a file with an array `arr_0`, uint8 (n, h, w, 1 or 3).

    Raises:
        ValueError: if the array is another one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _named(path), zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            self.shape = self._header(stream)

    def __len__(self) -> int:
        """Return the number of images."""
        return self.shape[0]

    def batches(self, shares: Sequence[range]) -> Iterator[Tensor]:
        """Yield the images of each share, uint8 (n, c, h, w).

        Raises:
            ValueError: if the file is damaged.
        """
        size = int(np.prod(self.shape[1:]))
        with _named(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            self._header(stream)
            at = 0
            for share in shares:
                stream.seek((share.start - at) * size, 1)
                content = stream.read(len(share) * size)
                if len(content) < len(share) * size:
                    raise ValueError(f"{self.path}: {IMAGES} ends before image {share.stop - 1}: is it a whole file?")
                at = share.stop
                pixels = np.frombuffer(content, np.uint8).reshape(len(share), *self.shape[1:])
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
    """The images of a folder and of all folders below it, in the order of their names, all of one size.

    They have three channels if any of them is colored or has a palette with colors, in which grey images have three
    equal channels. They have one channel if all are grey. What else is in the folder is counted in one warning.

    Args:
        folder: with images of any format that `image_reader.formats` names.

    Raises:
        ValueError: if there is no image, or the header of one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.files, left_out = _images(folder)
        if getattr(rank_zero_only, "rank", 0) == 0 and left_out:
            log.warning("left out of the reference %s: %s", folder, counted(left_out))
        if not self.files:
            found = f"; it has {counted(left_out)}" if left_out else ""
            raise ValueError(f"no images in {folder}: expected .jpg, .png, ...{found}")
        modes = dict(zip(self.files, read_modes([Location(str(file)) for file in self.files]), strict=True))
        faults = {printable(file): str(error) for file, error in modes.items() if isinstance(error, ValueError)}
        if faults:
            raise ValueError(broken(faults))
        self.mode = "RGB" if "RGB" in modes.values() else "L"
        self.size = read_image(self.files[0]).size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def batches(self, shares: Sequence[range]) -> Iterator[Tensor]:
        """Yield the images of each share, uint8 (n, c, h, w).

        Raises:
            ValueError: if one cannot be read or is of another size than the first.
        """
        channels = len(self.mode)
        for share in shares:
            pixels = torch.empty(len(share), self.size[1], self.size[0], channels, dtype=torch.uint8)
            for row, number in enumerate(share):
                pixels[row] = self._read(self.files[number]).reshape(pixels.shape[1:])
            yield rearrange(pixels, "n h w c -> n c h w")

    def _read(self, file: Path) -> Tensor:
        image = read_image(file)
        if image.size != self.size:
            first = f"{printable(self.files[0])} {self.size[0]} x {self.size[1]}"
            sizes = f"{image.size[0]} x {image.size[1]}, and {first}"
            raise ValueError(f"images must be of one size: {printable(file)} is {sizes}")
        return torch.from_numpy(np.array(image.convert(self.mode)))


def _images(folder: Path) -> tuple[list[Path], Counter[str]]:
    listing = list_files(folder, suffixes())
    return [folder.joinpath(*parts) for parts in listing.files], listing.left_out


def _moments(content: Mapping[str, np.ndarray], keys: tuple[str, str], path: Path) -> Moments:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} has {keys[0]} but no {missing[0]}: {EXPECTED}")
    # numpy returns the bytes of a member that does not hold an array.
    arrays = [np.asarray(content[key]) for key in keys]
    if not all(array.dtype.kind in "fiu" for array in arrays):
        raise ValueError(
            f"{path}: {keys[0]} and {keys[1]} must be real numbers: got {arrays[0].dtype}, {arrays[1].dtype}"
        )
    mean, covariance = (torch.from_numpy(np.array(array, dtype=np.float64)) for array in arrays)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        got = f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise ValueError(f"{path}: {keys[0]} must be (d,) and {keys[1]} (d, d): {got}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path}: {keys[0]} and {keys[1]} must be finite: make the file again")
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.abs().max())):
        raise ValueError(f"{path}: {keys[1]} must be symmetric, as a covariance is: make the file again")
    if covariance.diagonal().min() < 0:
        raise ValueError(
            f"{path}: the diagonal of {keys[1]} holds variances, which are at least 0: make the file again"
        )
    return Moments(mean, covariance)
