"""The one reader of image files: 8 bits, grey or RGB, upright and on white, whatever the file holds."""

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
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
"""The formats that Pillow recognizes and this package does not read, and why."""
THREADS = 16
HEAD = 512
Item = TypeVar("Item")
Result = TypeVar("Result")


class Location(NamedTuple):
    """Where the bytes of an image are.

    Args:
        file: the file that holds them.
        offset: the first byte in that file.
        length: the number of bytes; -1 for the rest of the file.
    """

    file: str
    offset: int = 0
    length: int = -1

    def open(self) -> io.BufferedReader:
        """Return a stream of the bytes alone."""
        whole = Path(self.file).open("rb")  # noqa: SIM115 - the caller closes it
        return whole if self.length < 0 else io.BufferedReader(_Window(whole, self.offset, self.length))

    def read(self, count: int = -1) -> bytes:
        """Return the bytes, or the first `count` of them."""
        with self.open() as content:
            return content.read(count)


class _Window(io.RawIOBase):
    """Some bytes of a file as a separate stream, because Pillow starts at the first byte of a stream."""

    def __init__(self, whole: io.BufferedReader, offset: int, length: int) -> None:
        self.whole = whole
        self.offset = offset
        self.length = length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self.position = position + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        self.whole.seek(self.offset + self.position)
        content = self.whole.read(count)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def close(self) -> None:
        self.whole.close()
        super().close()


class _Stored(NamedTuple):
    """How a file stores its pixels.

    Attributes:
        packing: in Pillow's words such as "RGB;16B", "" if it does not say.
        inverted: whether 0 is white, which Pillow honors for 8 bits only: TIFF's PhotometricInterpretation is 0.
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

    def is_grey(self, mode: str) -> bool:
        # Pillow gives 16-bit grey with opacity as RGBA.
        return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I") or self.packing.startswith("LA;")


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are read: all that it decodes, plugins included, but NOT_READ."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are read, in lower case, with their dots."""
    # An MPO file, which some cameras write, is a JPEG followed by others.
    read = {*formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def read_image(source: bytes | Path) -> Image.Image:
    """Return an image with 8 bits a channel, of mode L if it is grey and RGB otherwise.

    - The orientation in its EXIF data is applied; damaged EXIF data are ignored.
    - Transparent pixels are composited on white, as value * alpha + 255 * (1 - alpha).
    - 16-bit grey (modes I;16 and I) is divided by 257 and rounded, 12-bit grey by 4095 / 255. Mode I with values
      outside 0..65535 is refused.
    - Floats (mode F) are scaled from [0, 1] if all of them are in it, else from [0, 255], else from [0, 65535]. Other
      values, NaN and infinity are refused.
    - CMYK, YCbCr, LAB and HSV become RGB. Color profiles are not applied. A palette with grey entries only is grey.
    - Of several frames the first is read.

    Args:
        source: the bytes of a file, or its path.

    Raises:
        ValueError: saying what is wrong with the image, after its path if `source` is one.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as opened:
            stored = _Stored.of(opened)
            opened.load()
            return _on_white(_upright(opened), stored)
    # A damaged file fails in any way.
    except Exception as error:
        named = f"{printable(source)} " if isinstance(source, Path) else ""
        content = source if isinstance(source, bytes) else Location(str(source))
        raise ValueError(f"{named}cannot be read as an image ({_cause(error, content)})") from error


def pixels_of(image: bytes | Path, size: int) -> UInt8[Tensor, "3 size size"]:
    """Return an image as RGB pixels, cropped to a square about its center and resized.

    Raises:
        ValueError: if it cannot be read, as `read_image` says.
    """
    fitted = ImageOps.fit(read_image(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def read_mode(place: Location) -> str:
    """Return the mode that `read_image` will give, L or RGB, by the image's header alone if it has no palette.

    Raises:
        ValueError: if the header is damaged, or the file of a format that is not read.
    """
    try:
        with place.open() as content, Image.open(content, formats=formats()) as opened:
            mode, stored = opened.mode, _Stored.of(opened)
    except Exception as error:
        raise ValueError(f"cannot be read as an image ({_cause(error, place)})") from error
    if mode in ("P", "PA"):
        return read_image(place.read()).mode
    return "L" if stored.is_grey(mode) else "RGB"


def read_modes(places: Sequence[Location]) -> Iterator[str | ValueError]:
    """Yield for each image what `read_mode` returns or raises, in order, reading several at once."""
    return in_threads(_mode_or_error, places)


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the results for all items in order. The function is called in threads, which end with the generator."""
    # One task for each item would cost more than many of these functions.
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
        raise ValueError("it has pixels that are NaN or infinite")
    tops = (1, 255, 65535) if values.dtype.kind == "f" else (4095 if stored.packing.startswith("I;12") else 65535,)
    top = next((top for top in tops if high <= top), None)
    if low < 0 or top is None:
        raise ValueError(f"its values reach from {low:g} to {high:g}: expected 0 to {tops[-1]}")
    scaled = np.rint(values * (255 / top)).astype(np.uint8)
    return 255 - scaled if stored.inverted else scaled


def _base(image: Image.Image, stored: _Stored) -> Image.Image:
    """Return the colors as if the image were opaque."""
    if image.mode in ("P", "PA"):
        # A copy without the transparency, about which Pillow would warn.
        plain = image.copy()
        plain.info.pop("transparency", None)
        palette = np.array(plain.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
        return plain.convert("L" if (palette == palette[:, :1]).all() else "RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(f"{image.mode[:-1]}A")
    return image.convert("L" if stored.is_grey(image.mode) else "RGB")


def _alpha(image: Image.Image, stored: _Stored) -> Image.Image | None:
    """Return the opacity, mode L; None if the image is opaque everywhere."""
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        return image.getchannel(image.getbands()[-1])
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    key = image.info.get("transparency")
    # PNG gives the transparent color in the file's own bits, and Pillow the pixels in 8.
    if image.mode in ("1", "L") and isinstance(key, int):
        return _opacity(np.asarray(image.convert("L")) != key * {"L;2": 85, "L;4": 17}.get(stored.packing, 1))
    if image.mode == "RGB" and isinstance(key, tuple):
        shift = 8 if ";16" in stored.packing else 0
        return _opacity((np.asarray(image) != [value >> shift for value in key]).any(-1))
    return None


def _opacity(opaque: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))


def _cause(error: Exception, content: bytes | Location) -> str:
    """Return why an image is broken: one line, without an address in memory or the name of a file."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = said.partition("\n")[0].partition(" <_io")[0]
    if not first.startswith("cannot identify image file"):
        return first or repr(error)
    # The path that Pillow repeats is named by the caller.
    return describe_head(content[:HEAD] if isinstance(content, bytes) else content.read(HEAD)) or (
        "cannot identify image file"
    )
