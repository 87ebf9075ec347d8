"""Data module of a folder of images, as it is: pixels, or latents of a VAE."""

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from decm_lightning.autoencoders import LatentCoder, load_autoencoder
from decm_lightning.data.held_out import is_held_out
from decm_lightning.data.images.labelled_images import LabelledImages
from decm_lightning.data.images.pixels import PreparedImages, prepare_images
from decm_lightning.data.images.sources import find_images
from decm_lightning.data.latents.cached import encode_latents
from decm_lightning.data.resumable import ResumableData
from decm_lightning.errors import check_at_least
from decm_lightning.files import text_sha256
from decm_lightning.image_listing import broken, counted
from decm_lightning.types import Batch


class ImageFolder(ResumableData):
    """A folder of images with class labels, (channels, size, size) in [-1, 1], or the latents of a VAE.

    The folder has class folders, whose sorted names are numbered; or images only, which are one class; or tars with
    name.jpg and name.cls, .json or .txt; or a data set of Hugging Face's `datasets`: written by `save_to_disk`, parquet
    files, or a name on the hub. Links are followed, and hidden files are skipped.

    Images are read once, resized so that their shorter side is `size`, center-cropped, and stored in `cache` in uint8.
    All broken images are therefore found before training starts. The stored pixels are mapped into memory: small sets
    stay there, and of large ones each batch is read from disk. With a VAE, the latents of the images and of their
    mirror images are encoded once and stored in float16, normalized as (z - shift_factor) * scaling_factor.

    A hash of a file's content decides whether it is held out, and determines the order before shuffling. Neither
    depends on names or on other files, and copies of a file are in the same part.

    Args:
        folder: the images; see above.
        size: height and width in pixels, at least 1.
        batch_size: images per training batch on each device, at least 1.
        channels: 1 for gray, 3 for color; None for the channels of the images, or of the VAE.
        flip: whether to mirror a random half of the training images in each epoch. Set it to false for text and digits.
        vae: the VAE for latents: a folder, a name on the Hugging Face hub, or a file; see `load_autoencoder`. None for
            pixels.
        held_out: fraction of images that are held out as the reference, in [0, 1). With 0, the training images are
            the reference.
        reference_size: maximum number of reference images; None for all.
        image_column: column of the images in a data set.
        label_column: column of the classes in a data set; None for one class.
        split: split of a data set.
        cache: folder of the stored pixels and latents.
        on_error: "raise" to stop at broken images, or "skip" to count them in the log and train on the others.
        num_workers: number of loading processes; 0 is fastest for small images.

    Raises:
        ValueError: if a number is outside its range.
    """

    train: LabelledImages
    reference: LabelledImages
    class_names: tuple[str, ...]

    def __init__(
        self,
        folder: str,
        size: int,
        batch_size: int = 64,
        channels: Literal[1, 3] | None = None,
        flip: bool = True,
        vae: str | None = None,
        held_out: float = 0.1,
        reference_size: int | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        split: str = "train",
        cache: str = "runs/cache",
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, reference_size, num_workers)
        check_at_least(1, size=size)
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be in [0, 1): got {held_out}")
        self.folder = self.data_name = folder
        self.size = size
        self.channels = channels
        self.variants = 2 if flip else 1
        self.vae = vae
        self.held_out = held_out
        self.image_column = image_column
        self.label_column = label_column
        self.split = split
        self.cache = Path(cache)
        self.on_error = on_error

    def prepare_data(self) -> None:
        """Read the images, and encode them with a VAE, in one process of each machine, unless they are stored."""
        self._load(is_first=True)

    def setup(self, stage: str) -> None:
        """Open the stored images, and split them.

        Raises:
            FileNotFoundError: if the folder or the VAE does not exist, or there is no image.
            ImportError: if `datasets` is needed and not installed.
            ValueError: if images are broken, smaller than `size` or without a label and on_error is "raise"; if some
                are gray and others in color and `channels` is None; if a column or the split does not exist; or if the
                network expects samples of another shape.
        """
        stored = self._load()
        images, mirrored = self._samples(stored)
        self.check_network(f"the samples of {self.folder} are", tuple(images.shape[1:]))
        # The order of hashes is the same for a folder and for tars of the same files.
        order = sorted(range(len(stored.names)), key=stored.hashes.__getitem__)
        held = is_held_out([stored.hashes[row] for row in order], self.held_out)
        rows = torch.tensor(order)
        reference = rows[held] if self.held_out else rows
        labels = stored.labels.tolist()
        hash = text_sha256(" ".join(f"{stored.hashes[row]} {labels[row]}" for row in order))[:16]
        self.train = LabelledImages(images, stored.labels, stored.names, rows[~held], mirrored, hash)
        self.reference = LabelledImages(images, stored.labels, stored.names, reference)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the reference images, in order.

        Raises:
            ValueError: if no image is held out.
        """
        if not len(self.reference):
            count = len(self.train)
            raise ValueError(f"no image is held out: increase held_out, which is {self.held_out} of {count}")
        return super().val_dataloader()

    def _load(self, is_first: bool = False) -> PreparedImages:
        if self.vae is not None:
            self.coder = self.coder or LatentCoder(load_autoencoder(self.vae))
        coder = self.coder
        source = find_images(self.folder, self.on_error, self.image_column, self.label_column, self.split)
        self.class_names = source.class_names
        self.num_classes = len(source.class_names)
        channels = self.channels if coder is None else coder.autoencoder.image_channels
        stored = prepare_images(source, self.cache, self.size, channels)
        if stored.errors and (self.on_error == "raise" or not stored.names):
            remedy = "replace or delete them, or set on_error: skip to leave them out"
            raise ValueError(f"{broken(stored.errors)}: {remedy}")
        if is_first and stored.errors:
            rank_zero_warn(f"{broken(stored.errors)}: they are left out")
        if is_first and source.left_out:
            rank_zero_warn(f"{self.folder} has files that are not read: {counted(source.left_out)}")
        if is_first:
            self._samples(stored)
        return stored

    def _samples(self, stored: PreparedImages) -> tuple[Tensor, Tensor | None]:
        """Return the pixels, or the latents of the images and of their mirror images."""
        if self.coder is None:
            return stored.images, None
        mirrored = encode_latents(stored, self.coder, self.device, mirrored=True) if self.variants > 1 else None
        return encode_latents(stored, self.coder, self.device), mirrored
