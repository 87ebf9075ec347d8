"""Images with class labels, in memory or stored on disk."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from decm_lightning.data.resumable import BatchDataset
from decm_lightning.files import tensors_sha256
from decm_lightning.types import Batch


class LabelledImages(BatchDataset):
    """Images or latents with labels, read one batch at a time. Of N images, item N + i is image i mirrored.

    Args:
        images: (n, c, h, w): images in [-1, 1], pixels in uint8, or latents in float16, which are not scaled.
        labels: (n,).
        names: name of each image, for messages; none for its number.
        rows: indices of the N images that are used; None for all.
        mirrored: the latents of the mirror images; None to mirror the images.
        hash: a hash of the content; "" to compute it from images and labels.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        names: Sequence[str] = (),
        rows: Tensor | None = None,
        mirrored: Tensor | None = None,
        hash: str = "",
    ) -> None:
        self.images = images
        self.labels = labels
        self.names = names
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self.mirrored = mirrored
        self.hash = hash

    def __len__(self) -> int:
        """Return the number of images that are used."""
        return len(self.rows)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""
        index = torch.as_tensor(items)
        rows, flipped = self.rows[index % len(self)], index >= len(self)
        stored = self.images[rows]
        stored[flipped] = stored[flipped].flip(-1) if self.mirrored is None else self.mirrored[rows[flipped]]
        # Latents become float32, and images in float64 stay as they are.
        x_1 = stored.to(torch.promote_types(stored.dtype, torch.float32))
        return Batch(x_1 / 127.5 - 1 if stored.dtype == torch.uint8 else x_1, self.labels[rows])

    def place(self, item: int) -> str:
        """Return the name or number of an item's image."""
        row = int(self.rows[item % len(self)])
        return self.names[row] if self.names else super().place(row)

    @cached_property
    def _identity(self) -> str:
        return self.hash or tensors_sha256({"images": self.images, "labels": self.labels})[:16]

    def identity(self) -> str:
        """Return a hash of the images and labels."""
        return self._identity
