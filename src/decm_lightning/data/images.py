"""A training loader that keeps its place, which all data share, and images held in memory with their loaders."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from decm_lightning.even_split import EvenBatches
from decm_lightning.types import Batch, Sample

EVALUATED_AT_ONCE = 256


class Rows(Dataset[Batch]):
    """A data set that is read a batch at a time."""

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """Return the batch of the given rows."""
        raise NotImplementedError

    def __getitem__(self, rows: int | Sequence[int]) -> Batch:
        """Return the batch of the given rows, or of one row."""
        return self.__getitems__([rows] if isinstance(rows, int) else rows)


class LabelledImages(Rows):
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


class ResumableData(L.LightningDataModule):
    """The loader over `train`, which a subclass fills in `setup`; it keeps its place.

    A run stopped in the middle of an epoch goes on with the next batch.

    Args:
        batch_size: images per training batch on each device, at least 1.
        num_workers: loading processes.

    Raises:
        ValueError: if batch_size is below 1.
    """

    num_classes: int
    train: Rows
    sampler: type[DistributedSampler[int]] = DistributedSampler

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = torch.initial_seed() % 2**31
        self.saved_workers: int | None = None

    def train_dataloader(self) -> StatefulDataLoader:
        """Return shuffled training batches, the last incomplete one left out; each process gets its own share.

        Raises:
            ValueError: if there are too few images for one batch in each process: Lightning would train no step; or if
                the run that is resumed had another number of workers.
        """
        if self.saved_workers not in (None, self.num_workers):
            remedy = f"give --data.init_args.num_workers {self.saved_workers}"
            raise ValueError(f"each worker keeps its own place in the epoch, so resume with as many: {remedy}")
        # Its order follows from the seed and the epoch alone, unlike a RandomSampler's, which a resumed run cannot
        # repeat beyond its first epoch.
        trainer = self.trainer
        world = trainer.world_size if trainer else 1
        if len(self.train) < world * self.batch_size:
            needed = f"{world} processes with batch_size {self.batch_size} need {world * self.batch_size}"
            raise ValueError(f"too few training images: {needed}, got {len(self.train)}")
        sampler = self.sampler(
            self.train, num_replicas=world, rank=trainer.global_rank if trainer else 0, seed=self.seed
        )
        # Lightning sets the epoch only from the next one on when it resumes in the middle of one.
        sampler.set_epoch(trainer.current_epoch if trainer else 0)
        return StatefulDataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
        )

    def evenly(self, rows: Dataset[Batch]) -> StatefulDataLoader:
        """Return a loader of all rows in order, split evenly among the processes, each row once."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = EvenBatches(rows, EVALUATED_AT_ONCE, rank, world)
        return StatefulDataLoader(
            rows, batch_size=None, sampler=batches, num_workers=self.num_workers, collate_fn=as_it_is
        )

    def decode(self, x: Sample) -> Sample:
        """Return the images in [-1, 1] of what the network makes: pixels are images already."""
        return x

    def state_dict(self) -> dict[str, int]:
        """Return the seed of the order, and how many workers keep the place in it."""
        return {"seed": self.seed, "num_workers": self.num_workers}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on with the order of the run that is resumed."""
        self.seed = state_dict["seed"]
        self.saved_workers = state_dict.get("num_workers")


class InMemoryImages(ResumableData):
    """Loaders over `train` and `reference` images, which a subclass fills in `setup`.

    Args:
        batch_size: images per training batch on each device, at least 1.
        reference_size: at most so many reference images, at least 1; None for all.
        num_workers: loading processes; 0 is fastest for images in memory.

    Raises:
        ValueError: if batch_size or reference_size is below 1.
    """

    train: LabelledImages
    reference: LabelledImages

    def __init__(self, batch_size: int, reference_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        if reference_size is not None and reference_size < 1:
            raise ValueError(f"reference_size must be at least 1: got {reference_size}")
        self.reference_size = reference_size

    def val_dataloader(self) -> StatefulDataLoader:
        """Return the reference images of the Fréchet distance, in order."""
        rows = self.reference
        if self.reference_size is not None:
            rows = LabelledImages(rows.images[: self.reference_size], rows.labels[: self.reference_size])
        return self.evenly(rows)

    def test_dataloader(self) -> StatefulDataLoader:
        """Return the reference images of the Fréchet distance, in order."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StatefulDataLoader:
        """Return the reference images, of which `decm predict` reads the labels."""
        return self.val_dataloader()


def as_it_is(batch: Batch) -> Batch:
    """Return what `Rows` made a batch already."""
    return batch
