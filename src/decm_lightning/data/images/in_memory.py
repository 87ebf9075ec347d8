"""Images with class labels in memory, and their loaders."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from decm_lightning.data.resumable import BatchDataset, ResumableData
from decm_lightning.files import tensors_sha256
from decm_lightning.types import Batch


class LabelledImages(BatchDataset):
    """Images in [-1, 1] with class labels, read one batch at a time.

    Args:
        images: (n, c, h, w), float.
        labels: (n,), integer.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """Return the batch of the given rows."""
        index = torch.as_tensor(rows)
        return Batch(self.images[index], self.labels[index])

    @cached_property
    def _identity(self) -> str:
        return tensors_sha256({"images": self.images, "labels": self.labels})[:16]

    def identity(self) -> str:
        """Return a hash of the images and labels."""
        return self._identity


class InMemoryImages(ResumableData):
    """Loaders over `train` and `reference` images, which a subclass sets in `setup`.

    Args:
        batch_size: images per training batch on each device, at least 1.
        reference_size: maximum number of reference images, at least 1; None for all.
        num_workers: number of loading processes; 0 is fastest for images in memory.

    Raises:
        ValueError: if a number is below its minimum.
    """

    train: LabelledImages
    reference: LabelledImages

    def __init__(self, batch_size: int, reference_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__(batch_size, reference_size, num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the reference images of the Fréchet distance, in order."""
        rows = self.reference
        if self.reference_size is not None:
            rows = LabelledImages(rows.images[: self.reference_size], rows.labels[: self.reference_size])
        return self.evenly(rows)
