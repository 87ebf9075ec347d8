"""Read image files of any format as 8-bit gray or RGB images, upright and composited on white."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from PIL.ContainerIO import ContainerIO
from torch import Tensor

from decm_lightning.files import describe_head
from decm_lightning.image_listing import printable

NOT_READ = {
    "EPS": "a program, which Pillow hands to Ghostscript",
    "WMF": "vector graphics, which only Windows can rasterize",
    "MPEG": "video, of which Pillow reads the size only",
    "BUFR": "Pillow has no decoder",
    "GRIB": "Pillow has no decoder",
    "HDF5": "Pillow has no decoder",
}
"""Formats that Pillow recognizes but this package does not read, with the reason."""
THREADS = 16
HEAD = 512
Item = TypeVar("Item")
Result = TypeVar("Result")


class Location(NamedTuple):
    """Where the bytes of an image are stored: a range of a file; a length of -1 stands for its rest."""

    file: str
    offset: int = 0
    length: int = -1

    def open(self) -> IO[bytes]:
        """Return a stream of these bytes only."""
        whole = Path(self.file).open("rb")  # noqa: SIM115 - the caller closes it
        return whole if self.length < 0 else ContainerIO(whole, self.offset, self.length)

    def read(self, count: int = -1) -> bytes:
        """Return all bytes, or the first `count` bytes."""
        with self.open() as content:
            return content.read(count)


class _Stored(NamedTuple):
    """How a file stores its pixels: Pillow's raw mode, such as "RGB;16B", and whether 0 is white.

    The raw mode is "" if it is unknown. Pillow handles white zeros (PhotometricInterpretation 0 in TIFF) for 8 bits
    only.
    """

    packing: str
    inverted: bool

    @classmethod
    def of(cls, opened: Image.Image) -> "_Stored":
        tiles = getattr(opened, "tile", None)
        arguments = tiles[0][3] if tiles else ""
        packing = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        inverted = opened.mode.startswith(("I;16", "F")) and getattr(opened, "tag_v2", {}).get(262) == 0
        return cls(packing if isinstance(packing, str) else "", inverted)

    def is_gray(self, mode: str) -> bool:
        # Pillow decodes 16-bit gray with alpha as RGBA.
        return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I") or self.packing.startswith("LA;")


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats: all that it decodes, including plugins, except NOT_READ."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of the supported formats, in lower case and with a dot."""
    # An MPO file, which some cameras write, is a sequence of JPEG images.
    read = {*formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def read_image(source: bytes | Path) -> Image.Image:
    """Read an image with 8 bits per channel, in mode L if it is gray and RGB otherwise.

    - The EXIF orientation is applied. Damaged EXIF data is ignored.
    - Transparent pixels are composited on white: value * alpha + 255 * (1 - alpha).
    - 16-bit gray (modes I;16 and I) is divided by 257 and rounded, 12-bit gray by 4095 / 255. Mode I with values
      outside 0..65535 is refused.
    - Floats (mode F) are scaled from the smallest of [0, 1], [0, 255] and [0, 65535] that contains all values. Other
      values, NaN and infinity are refused.
    - CMYK, YCbCr, LAB and HSV are converted to RGB. Color profiles are ignored. An image whose palette is gray is gray.
    - Only the first frame of an animation is read.

    Args:
        source: the content of a file, or its path.

    Raises:
        ValueError: if the image cannot be read. The message starts with the path if `source` is a path.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as opened:
            stored = _Stored.of(opened)
            opened.load()
            return _on_white(_upright(opened), stored)
    # Pillow raises errors of many types for damaged files.
    except Exception as error:
        named = f"{printable(source)} " if isinstance(source, Path) else ""
        content = source if isinstance(source, bytes) else Location(str(source))
        raise ValueError(f"{named}cannot be read as an image ({_cause(error, content)})") from error


def pixels_of(image: bytes | Path, size: int) -> UInt8[Tensor, "3 size size"]:
    """Return the RGB pixels of an image, center-cropped to a square and resized.

    Raises:
        ValueError: if the image cannot be read; see `read_image`.
    """
    fitted = ImageOps.fit(read_image(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def read_mode(place: Location) -> str:
    """Return the mode that `read_image` will return, L or RGB. Only an image with a palette is read beyond its header.

    Raises:
        ValueError: if the header is damaged or the format is not supported.
    """
    try:
        with place.open() as content, Image.open(content, formats=formats()) as opened:
            mode, stored = opened.mode, _Stored.of(opened)
    except Exception as error:
        raise ValueError(f"cannot be read as an image ({_cause(error, place)})") from error
    if mode in ("P", "PA"):
        return read_image(place.read()).mode
    return "L" if stored.is_gray(mode) else "RGB"


def read_modes(places: Sequence[Location]) -> Iterator[str | ValueError]:
    """Yield the result or error of `read_mode` for each image in order. Several images are read at once."""
    return in_threads(_mode_or_error, places)


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Call a function for all items in threads and yield the results in order. The threads end with the generator."""
    # One task per item would often cost more than the function itself.
    parts = [items[start : start + 64] for start in range(0, len(items), 64)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        for results in pool.map(lambda part: [function(item) for item in part], parts):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def _mode_or_error(place: Location) -> str | ValueError:
    try:
        return read_mode(place)
    except ValueError as error:
        return error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _on_white(image: Image.Image, stored: _Stored) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        base = Image.fromarray(_eight_bits(values, stored))
        key = image.info.get("transparency")
        alpha = None if key is None else _opacity(values != key)
    else:
        base, alpha = _base(image, stored), _alpha(image, stored)
    return base if alpha is None else Image.composite(base, Image.new(base.mode, base.size, "white"), alpha)


def _eight_bits(values: np.ndarray, stored: _Stored) -> np.ndarray:
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise ValueError("it has NaN or infinite pixels")
    tops = (1, 255, 65535) if values.dtype.kind == "f" else (4095 if stored.packing.startswith("I;12") else 65535,)
    top = next((top for top in tops if high <= top), None)
    if low < 0 or top is None:
        raise ValueError(f"its values range from {low:g} to {high:g}: expected 0 to {tops[-1]}")
    scaled = np.rint(values * (255 / top)).astype(np.uint8)
    return 255 - scaled if stored.inverted else scaled


def _base(image: Image.Image, stored: _Stored) -> Image.Image:
    """Return the colors without transparency."""
    if image.mode in ("P", "PA"):
        # Pillow warns when it converts a palette with transparency.
        plain = image.copy()
        plain.info.pop("transparency", None)
        palette = np.array(plain.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return plain.convert("L" if (palette == palette[:, :1]).all() else "RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(f"{image.mode[:-1]}A")
    return image.convert("L" if stored.is_gray(image.mode) else "RGB")


def _alpha(image: Image.Image, stored: _Stored) -> Image.Image | None:
    """Return the opacity in mode L; None if the image is opaque."""
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        return image.getchannel(image.getbands()[-1])
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    key = image.info.get("transparency")
    # PNG stores the transparent color at the file's bit depth, but Pillow returns 8-bit pixels.
    if image.mode in ("1", "L") and isinstance(key, int):
        return _opacity(np.asarray(image.convert("L")) != key * {"L;2": 85, "L;4": 17}.get(stored.packing, 1))
    if image.mode == "RGB" and isinstance(key, tuple):
        shift = 8 if ";16" in stored.packing else 0
        return _opacity((np.asarray(image) != [value >> shift for value in key]).any(-1))
    return None


def _opacity(opaque: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))


def _cause(error: Exception, content: bytes | Location) -> str:
    """Return why an image is broken in one line, without memory addresses or file names."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = said.partition("\n")[0].partition(" <_io")[0]
    if not first.startswith("cannot identify image file"):
        return first or repr(error)
    # Pillow repeats the path here, but the caller names it already.
    return describe_head(content[:HEAD] if isinstance(content, bytes) else content.read(HEAD)) or (
        "cannot identify image file"
    )
