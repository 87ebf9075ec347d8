"""Images held in memory: batches by index, and the three loaders that every small data set shares."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from decm_lightning.types import Batch


class LabelledImages(Dataset):
    """Images in [-1, 1] with their class labels, fetched a batch at a time.

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


class InMemoryImages(L.LightningDataModule):
    """Loaders over `train` and `reference` images, which a subclass fills in `setup`.

    The training loader keeps its place: a run stopped in the middle of an epoch goes on with the next batch.

    Args:
        batch_size: images per training batch on each device, at least 1.
        reference_size: at most so many reference images; None for all.
        num_workers: loading processes; 0 is fastest for images in memory.

    Raises:
        ValueError: if batch_size is below 1.
    """

    num_classes: int
    train: LabelledImages
    reference: LabelledImages

    def __init__(self, batch_size: int, reference_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")
        self.batch_size = batch_size
        self.reference_size = reference_size
        self.num_workers = num_workers
        self.seed = torch.initial_seed() % 2**31

    def train_dataloader(self) -> StatefulDataLoader:
        """Return shuffled training batches, the last incomplete one left out; each process gets its own share."""
        # Its order follows from the seed and the epoch alone, unlike a RandomSampler's, which a resumed run cannot
        # repeat beyond its first epoch.
        trainer = self.trainer
        sampler: DistributedSampler[Batch] = DistributedSampler(
            self.train,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
        )
        # Lightning sets the epoch only from the next one on when it resumes in the middle of one.
        sampler.set_epoch(trainer.current_epoch if trainer else 0)
        return StatefulDataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
        )

    def val_dataloader(self) -> StatefulDataLoader:
        """Return the reference images of the Fréchet distance, in order."""
        rows = self.reference
        if self.reference_size is not None:
            rows = LabelledImages(rows.images[: self.reference_size], rows.labels[: self.reference_size])
        return StatefulDataLoader(rows, batch_size=256, num_workers=self.num_workers, collate_fn=_as_it_is)

    def test_dataloader(self) -> StatefulDataLoader:
        """Return the reference images of the Fréchet distance, in order."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StatefulDataLoader:
        """Return the reference images, of which `decm predict` reads the labels."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, int]:
        """Return the seed of the order."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with the order of the run that is resumed."""
        self.seed = state_dict["seed"]


def _as_it_is(batch: Batch) -> Batch:
    return batch
