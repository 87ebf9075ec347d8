"""Samples as pictures: bytes, one grid, or one file each."""

from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from decm_lightning.types import Sample

Pictures = UInt8[Tensor, "n c h w"]


def to_uint8(x: Sample) -> Tensor:
    """Return images in [-1, 1] as uint8, round(127.5 (x + 1)) clamped to 0..255: rounded, where a cast truncates."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images: Pictures, columns: int, scale: int, file: Path) -> None:
    """Write all images, `columns` in a row and each enlarged `scale` times, as one PNG; its folder is made if need be.

    Raises:
        ValueError: if the images have neither 1 nor 3 channels.
    """
    grid = rearrange(images, "(row column) c h w -> c (row h) (column w)", column=columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)).save(file)


def save_files(images: Pictures, labels: Int[Tensor, " n"] | None, folder: Path, first: int = 0) -> None:
    """Write each image as <number>_class<label>.png, or <number>.png without labels, numbers starting at `first`.

    The folder is made if need be.

    Raises:
        ValueError: if the images have neither 1 nor 3 channels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [""] * len(images) if labels is None else [f"_class{label}" for label in labels.tolist()]
    for number, (image, name) in enumerate(zip(images, names, strict=True), start=first):
        picture(image).save(folder / f"{number:06d}{name}.png")


def picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """Return one image for PIL.

    Raises:
        ValueError: if it has neither 1 nor 3 channels.
    """
    if len(image) not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels: got {len(image)} (latents need a decoder)")
    pixels = rearrange(image, "c h w -> h w c").cpu().numpy()
    return Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels)
