"""Write images as a grid or as single files."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from decm_lightning.errors import NonFiniteError, needs
from decm_lightning.files import atomic
from decm_lightning.types import Sample

LONG = 8
"""Headings with more characters are slanted, so that they do not overlap."""
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
"""The first and the last bytes of every complete PNG file."""
Images = UInt8[Tensor, "n c h w"]


def to_uint8(x: Sample) -> Tensor:
    """Convert images in [-1, 1] to uint8: round(127.5 (x + 1)), clamped to 0..255.

    Raises:
        NonFiniteError: if a value is NaN or infinite.
    """
    # The cast would turn NaN and infinity into black or white.
    if not x.isfinite().all():
        raise NonFiniteError("images are not finite: the weights have diverged, use an earlier checkpoint")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images: Images, columns: int, scale: int, file: Path) -> None:
    """Write all images as one PNG with `columns` images per row, each enlarged `scale` times; create its folder.

    Raises:
        ValueError: if the images have neither 1 nor 3 channels.
    """
    grid = rearrange(images, "(row column) c h w -> c (row h) (column w)", column=columns)
    image = to_pil(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    with atomic(file) as partial:
        image.save(partial, "PNG")


def save_named_grid(
    images: UInt8[Tensor, "rows columns c h w"], rows: Sequence[str], columns: Sequence[str], file: Path
) -> None:
    """Write a PNG with a row of images per name, the name to its left, and headings above the first row.

    The images have 1 or 3 channels. The headings are spread evenly over the columns; there may be none. The folder of
    the file is created.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the images have neither 1 nor 3 channels.
    """
    check_plots()
    # Without pyplot no window opens, and the backend of a notebook does not change.
    from matplotlib.figure import Figure

    across, width = images.shape[1], images.shape[-1]
    figure = Figure(figsize=(0.7 * across, 0.75 * len(rows)))
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, strip, name in zip(axes, images, rows, strict=True):
        pixels = to_pil(rearrange(strip, "columns c h w -> c h (columns w)"))
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation="horizontal", ha="right", va="center")
    if columns:
        group = across * width / len(columns)
        slanted = {"rotation": 40, "ha": "left"} if max(map(len, columns)) > LONG else {}
        axes[0].xaxis.tick_top()
        axes[0].tick_params(length=0)
        axes[0].set_xticks([(number + 0.5) * group for number in range(len(columns))], columns, **slanted)
    with atomic(file) as partial:
        # Without a tight box, long names would be cut off.
        figure.savefig(partial, dpi=120, bbox_inches="tight", format="png")


def check_plots() -> None:
    """Check that `save_named_grid` can run, before hours of computation.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with needs("a grid with names", "matplotlib", "plots"):
        import matplotlib  # noqa: F401


def short(caption: str) -> str:
    """Shorten a caption to a heading: the words before its first comma, in at most 24 characters.

    Example:
        >>> short("a red fox, in the snow")
        'a red fox'
    """
    return shorten(caption.partition(",")[0], 24, placeholder=" ...")


def has_whole_png(file: Path, size: tuple[int, int] | None = None) -> bool:
    """Return whether a file has the first and last bytes of a PNG, and this size (width, height) if one is passed.

    Raises:
        OSError: if the file exists and cannot be read.
    """
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    found = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    return content.startswith(PNG) and content.endswith(PNG_END) and size in (None, found)


def to_pil(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """Convert an image to PIL.

    Raises:
        ValueError: if it has neither 1 nor 3 channels.
    """
    if len(image) not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels: got {len(image)} (latents need a decoder)")
    pixels = rearrange(image, "c h w -> h w c").cpu().numpy()
    return Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels)
