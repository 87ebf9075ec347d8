"""Images with class labels in memory."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from decm_lightning.data.resumable import BatchDataset
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
