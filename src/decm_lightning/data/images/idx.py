"""Read folders of four IDX files, the format of MNIST and Fashion-MNIST, gzipped or not."""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from decm_lightning.data.images.labelled_images import LabelledImages
from decm_lightning.data.resumable import ResumableData
from decm_lightning.files import describe_unreadable

UNSIGNED_BYTE = 0x08
GZIP = b"\x1f\x8b"


class IDXImages(ResumableData):
    """Gray images with labels from `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the two `t10k-` files.

    Images are (1, h, w), scaled from 0..255 to [-1, 1]. The `train` files are used for training only, the `t10k` files
    as the reference only.

    Args:
        folder: folder of the four files, each plain or with .gz.
        batch_size: images per training batch on each device, at least 1.
        reference_size: maximum number of reference images; None for all.
        num_workers: number of loading processes; 0 is fastest for images in memory.
        class_names: names of the classes by label; students carry them. None for ten classes without names.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 128,
        reference_size: int | None = None,
        num_workers: int = 0,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(batch_size, reference_size, num_workers)
        self.folder = Path(folder)
        self.data_name = folder
        self.class_names = tuple(class_names or ())
        self.num_classes = len(self.class_names) or 10

    def setup(self, stage: str) -> None:
        """Load the training and reference images.

        Raises:
            FileNotFoundError: if the folder or a file is missing.
            ValueError: if a file is not in the IDX format, is cut short, or does not match its partner.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {self.folder}: set --data.folder to the folder of the four IDX files")
        self.train = self._load("train")
        self.reference = self._load("t10k")

    def _load(self, part: str) -> LabelledImages:
        images = read_idx(self._find(f"{part}-images-idx3-ubyte"))
        labels = read_idx(self._find(f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            shapes = f"{tuple(images.shape)} images, {tuple(labels.shape)} labels"
            raise ValueError(f"{part} files in {self.folder} do not match: {shapes}")
        if not images.numel():
            raise ValueError(f"{part} files in {self.folder} hold no images: {tuple(images.shape)}")
        if labels.max() >= self.num_classes:
            row = int((labels >= self.num_classes).nonzero()[0])
            raise ValueError(
                f"{part} labels in {self.folder}: row {row} is {labels[row]}: expected at most {self.num_classes - 1}"
            )
        return LabelledImages(images[:, None].float() / 127.5 - 1, labels.long())

    def _find(self, name: str) -> Path:
        for file in (self.folder / f"{name}.gz", self.folder / name):
            if os.path.lexists(file):
                return file
        raise FileNotFoundError(f"no file {name} or {name}.gz in {self.folder}")


def read_idx(file: Path) -> Tensor:
    """Read an IDX file, gzipped or not, as a uint8 tensor of the shape in its header."""
    try:
        content = file.read_bytes()
        if content.startswith(GZIP):
            content = gzip.decompress(content)
    except OSError as error:
        # The path cannot be opened, or the archive is broken.
        reason = describe_unreadable(file, text=True) or f"not a complete gzip file: {error}"
        raise ValueError(f"{file}: {reason}") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a complete gzip file: {error}") from error
    if content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        reason = describe_unreadable(file) or f"not an IDX file of unsigned bytes: it begins with {content[:4].hex()}"
        raise ValueError(f"{file}: {reason}")
    axes = int.from_bytes(content[3:4])
    header = 4 + 4 * axes
    if axes == 0 or len(content) < header:
        raise ValueError(f"{file}: cut short in the header of an IDX file, after {len(content)} bytes")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{file} holds {len(content) - header} values, but its header gives the shape {shape}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())
