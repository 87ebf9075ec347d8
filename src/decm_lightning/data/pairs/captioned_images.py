"""Base classes of data modules with captioned images, some of which are held out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float16, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from decm_lightning.data.held_out import is_held_out
from decm_lightning.data.resumable import BatchDataset, ResumableData
from decm_lightning.files import text_sha256
from decm_lightning.text import CaptionEncoder, EncodedCaptions, UnencodedCaptions
from decm_lightning.types import Batch, Condition

Stored = UInt8[Tensor, "n c h w"] | Float16[Tensor, "n c h w"]


class Pairs(BatchDataset):
    """Images in [-1, 1] or latents, with captions, read one batch at a time.

    Of N images, item N k + i is image i with its caption k. `images` (n, c, h, w) are pixels in uint8, or latents in
    float16, which are not scaled. `rows` are the indices of the N images that are used. The n * variants captions are
    grouped by image. A batch holds the numbers of captions that are not encoded.
    """

    def __init__(
        self,
        images: Stored,
        captions: EncodedCaptions | UnencodedCaptions,
        rows: Tensor,
        variants: int = 1,
        hash: str = "",
    ) -> None:
        assert len(captions) == len(images) * variants, (len(captions), len(images), variants)
        self.images = images
        self.captions = captions
        self.rows = rows
        self.variants = variants
        self.hash = hash

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""
        index = torch.as_tensor(items)
        rows = self.rows[index % len(self)]
        stored = self.images[rows]
        x_1 = stored.float() / 127.5 - 1 if stored.dtype == torch.uint8 else stored.float()
        return Batch(x_1, self.captions.read(self._captions(index)))

    def identity(self) -> str:
        """Return the hash."""
        return self.hash

    def condition(self, items: Sequence[int]) -> Condition:
        """Return the captions of the given items, or their numbers."""
        return self.captions.read(self._captions(torch.as_tensor(items)))

    def _captions(self, items: Tensor) -> Tensor:
        return self.rows[items % len(self)] * self.variants + items // len(self)


class CaptionedImages(ResumableData):
    """Loaders over pairs. Some pairs are held out as the reference, and tests generate samples for their captions.

    A subclass sets `encoder`, and calls `split` in `setup`.

    Args:
        batch_size: pairs per training batch on each device, at least 1.
        held_out: fraction of pairs that are not used for training, in [0, 1).
        reference_size: maximum number of reference images, at least 1; None for all held-out pairs.
        num_workers: number of loading processes.

    Attributes:
        texts: captions of the reference as text.

    Raises:
        ValueError: if a number is outside its range.
    """

    num_classes = 0
    train: Pairs
    reference: Pairs
    texts: list[str]
    encoder: CaptionEncoder

    def __init__(self, batch_size: int, held_out: float, reference_size: int | None, num_workers: int) -> None:
        super().__init__(batch_size, reference_size, num_workers)
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must be in [0, 1): got {held_out}")
        self.held_out = held_out

    def split(
        self,
        images: Stored,
        captions: EncodedCaptions | UnencodedCaptions,
        texts: Sequence[str],
        names: Sequence[str],
        variants: int = 1,
    ) -> None:
        """Set `train`, `reference` and `texts`. Images of the same name go into the same part.

        There are n * variants captions, grouped by image, and for each image its first caption as text. The reference
        uses the first.
        """
        self.variants = variants
        hash = text_sha256("".join(f"{n}\0{t}\0" for n, t in zip(names, texts, strict=True)))[:16]
        held = is_held_out(names, self.held_out)
        rows = held.nonzero().flatten()[: self.reference_size]
        self.train = Pairs(images, captions, held.logical_not().nonzero().flatten(), variants, hash)
        self.reference = Pairs(images, captions, rows, variants)
        self.texts = [texts[row] for row in rows.tolist()]

    def condition(self, rows: Sequence[int], seed: int = 0) -> Condition:
        """Return the captions of samples `rows`. Sample i uses held-out pair i mod their number.

        Raises:
            ValueError: if no pair is held out.
        """
        return self._held_out().condition([row % len(self.reference) for row in rows])

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the held-out pairs in order, which are the reference data; an empty list if held_out is 0.

        Raises:
            ValueError: if held_out is above 0, but no pair is held out.
        """
        if not self.held_out:
            return []
        return self.evenly(self._held_out())

    def _held_out(self) -> Pairs:
        if not len(self.reference):
            count = len(self.train)
            raise ValueError(f"no pair is held out: increase held_out, which is {self.held_out} of {count} pairs")
        return self.reference
