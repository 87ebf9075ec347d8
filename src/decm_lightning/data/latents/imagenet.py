"""Data module of VAE latents in LightningDiT's format: normalized, randomly mirrored, and checked before training."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Subset

from decm_lightning.autoencoders.normalization import STATISTICS, LatentNormalization, Moments, finite_rows
from decm_lightning.autoencoders.provenance import RECORD, Provenance, read_coder
from decm_lightning.data.latents.shards import BLOCK, Shards, describe_skipped
from decm_lightning.data.resumable import BatchDataset, ResumableData
from decm_lightning.files import tensors_sha256, text_sha256
from decm_lightning.networks.record import Record, Reference
from decm_lightning.types import Batch, Sample

SAMPLE = 1000


class Latents(BatchDataset):
    """Normalized latents with labels, read one batch at a time. Of N images, item N + i is image i mirrored.

    Args:
        folder: folder of safetensors shards and latents_stats.pt. An optional cache.json tells which VAE encoded them.
        num_classes: labels must be below it; None for the value in cache.json, or else for the largest label plus 1.
        latent_norm: whether to subtract the mean and divide by the std in latents_stats.pt.
        latent_multiplier: factor by which the latents are then multiplied, above 0.

    Raises:
        FileNotFoundError: if the folder, its shards or latents_stats.pt is missing.
        ValueError: if a file is invalid. The message names the file, and the row if the error is in one row.
    """

    def __init__(
        self, folder: str | Path, num_classes: int | None, latent_norm: bool = True, latent_multiplier: float = 1.0
    ) -> None:
        self.provenance = Provenance.read(folder)
        if num_classes is None and self.provenance is not None:
            num_classes = self.provenance.num_classes
        self.shards = Shards(folder, num_classes)
        if self.shards.skipped:
            rank_zero_warn(f"{describe_skipped(self.shards.skipped)} in {folder}")
        self.normalization = LatentNormalization.read(folder, self.shards.shape[0], latent_norm, latent_multiplier)
        if self.provenance is None:
            rank_zero_warn(
                f"no {RECORD} in {folder}: the VAE of these latents is unknown. Samples look wrong if another VAE "
                "decodes them, whatever the loss"
            )
            return
        self.provenance.check(self.shards, {"latent_norm": latent_norm, "latent_multiplier": latent_multiplier})
        if latent_norm:
            self.provenance.check_file(self.shards.folder / STATISTICS)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.shards)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""
        labels = self.shards.labels[torch.as_tensor(items) % len(self)]
        return Batch(self.normalization.normalize_(self.shards.read(items)), labels)

    def identity(self) -> str:
        """Return a hash of the labels and of the statistics, on which the order and the values of the rows depend."""
        labels = tensors_sha256({"labels": self.shards.labels})
        return text_sha256(f"{labels} {self.normalization.identity}")[:16]

    def place(self, item: int) -> str:
        """Return the file, row and key of an item, such as "shard000.safetensors: row 5 of latents_flip"."""
        return self.shards.place(item)

    def sample(self) -> list[range]:
        """Return blocks of items for `measure`: at most 1,000 images, plain and mirrored."""
        # Spread over all shards, because the first rows of an encoded ImageNet all belong to one class.
        count, step = len(self), math.ceil(len(self) / SAMPLE)
        return [
            range(start, min(start + BLOCK * step, end), step)
            for first, end in ((0, count), (count, 2 * count))
            for start in range(first, end, BLOCK * step)
        ]

    def measure(self, blocks: Iterable[Sequence[int]]) -> Moments:
        """Check that all items are finite, and return the moments of the normalized items.

        Raises:
            ValueError: if a latent is NaN or infinite (the message names its file and row), or if mean and standard
                deviation are far from 0 and 1.
        """
        moments = Moments(self.shards.shape[0])
        for items in blocks:
            x = self.shards.read(items)
            finite = finite_rows(x)
            if not finite.all():
                raise ValueError(f"{self.place(items[int(finite.long().argmin())])} is NaN or infinite")
            moments.add(self.normalization.normalize(x))
        self.normalization.check(moments, self.shards.folder)
        return moments


class ImageNetLatents(ResumableData):
    """Latents with labels from LightningDiT's shards, (c, h, w), normalized to mean 0 and standard deviation 1.

    The folder holds `latents_stats.pt` and `*.safetensors` files with `latents` (n, c, h, w), `latents_flip` and
    `labels`. All latents are used for training, and each row is read when it is needed. Headers, labels and about 1,000
    rows are checked before training starts; `decm validate-data` checks every row. Validation and test need the VAE,
    which decodes latents into images. Without `vae` they have no loaders.

    Args:
        folder: folder of the latents.
        batch_size: images per training batch on each device, at least 1.
        num_workers: number of loading processes on each device. They hide a slow disk; 0 is fastest for files in
            memory.
        num_classes: labels must be below it.
        latent_norm: whether to subtract the mean and divide by the std in latents_stats.pt, as for VA-VAE.
        latent_multiplier: factor by which the latents are then multiplied, above 0. Use 0.18215 with latent_norm false
            for Stable Diffusion's VAE.
        flip: whether to mirror a random half of the images in each epoch.
        vae: the VAE that encoded the images: a folder, a name on the Hugging Face hub, or a file such as VA-VAE's.
        reference_size: maximum number of latents in the loaders for validation and test, spread over all shards to mix
            the classes; None for all.

    Raises:
        ValueError: if a number is below its minimum.
    """

    train: Latents

    def __init__(
        self,
        folder: str,
        batch_size: int = 128,
        num_workers: int = 2,
        num_classes: int = 1000,
        latent_norm: bool = True,
        latent_multiplier: float = 1.0,
        flip: bool = True,
        vae: str | None = None,
        reference_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, reference_size, num_workers)
        self.folder = self.data_name = folder
        self.num_classes = num_classes
        self.latent_norm = latent_norm
        self.latent_multiplier = latent_multiplier
        self.vae = vae
        self.variants = 2 if flip else 1

    def setup(self, stage: str) -> None:
        """Open the folder and check a sample of it.

        Raises:
            FileNotFoundError: if the folder, its shards or latents_stats.pt is missing.
            ValueError: if a file is invalid, the network expects samples of another shape, or the VAE is not the one
                that encoded the images.
        """
        self.train = Latents(self.folder, self.num_classes, self.latent_norm, self.latent_multiplier)
        self.train.measure(self.train.sample())
        self.check_network(f"latents of {self.folder} are", self.train.shards.shape)
        if self.vae is not None and self.coder is None:
            self.coder = read_coder(self.vae, self.folder, self.train.normalization)

    def decode(self, x: Sample) -> Sample:
        """Decode normalized latents into images in [-1, 1].

        Raises:
            ValueError: if `vae` is None.
        """
        if self.coder is None:
            raise ValueError("latents need a decoder: set --data.init_args.vae to the VAE that encoded them")
        return super().decode(x)

    def record(self) -> Record:
        """Return the record of a network. Without a VAE, cache.json may tell which one encoded the latents."""
        own, provenance = super().record(), self.train.provenance
        unloaded = None if provenance is None else Reference("", provenance.vae)
        return replace(own, vae=own.vae or unloaded, latents=self.train.normalization.as_json())

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return a loader of reference latents in order, normalized as in training. Without a VAE the list is empty."""
        if self.vae is None:
            return []
        count = len(self.train)
        size = min(self.reference_size or count, count)
        rows = Subset(self.train, [number * count // size for number in range(size)])
        return self.evenly(rows)
