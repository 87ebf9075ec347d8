"""A training loader that keeps its place and loaders of a reference, which all data share."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from decm_lightning.data.fit import check_fit
from decm_lightning.data.protocol import HasNetwork
from decm_lightning.even_split import EvenBatches
from decm_lightning.seeds import generator_of
from decm_lightning.types import Batch, Sample

EVALUATED_AT_ONCE = 256


class BatchDataset(Dataset[Batch]):
    """A data set that is read a batch at a time.

    With variants of each row, such as mirrored images or several captions, item N k + i of N rows is row i's variant k.
    """

    def __len__(self) -> int:
        """Return the number of rows."""
        raise NotImplementedError

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""
        raise NotImplementedError

    def place(self, item: int) -> str:
        """Return where an item comes from, for error messages: its file and its row there, or its number."""
        return f"image {item}"

    def __getitem__(self, items: int | Sequence[int]) -> Batch:
        """Return the batch of the given items, or of one item."""
        return self.__getitems__([items] if isinstance(items, int) else items)


class EpochSampler(DistributedSampler[int]):
    """The shuffled rows of an epoch from row `skip` on, each in one of its variants, as items of a `BatchDataset`.

    Order and variants depend on the seed and the epoch alone, whatever the number of processes and workers. The order
    of a RandomSampler depends on all earlier random numbers, so that a resumed run cannot repeat it.

    Args:
        rows: the data set.
        variants: of each row, at least 1.
        options: of DistributedSampler.
    """

    def __init__(self, rows: Dataset[Batch], variants: int = 1, **options: Any) -> None:
        super().__init__(rows, **options)
        self.variants = variants
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        """Return the items of this process."""
        rows = islice(super().__iter__(), self.skip, None)
        if self.variants == 1:
            return rows
        count = len(self.dataset)  # type: ignore[arg-type]
        chosen = torch.randint(self.variants, (count,), generator=generator_of(self.seed, self.epoch)).numpy()
        return (row + count * int(chosen[row]) for row in rows)


class EpochLoader(DataLoader[Batch]):
    """A DataLoader that begins each epoch with the next batch of the run, when its first batch is requested.

    So a resumed run finds its place with any number of workers, and nothing has to be saved for it.

    Args:
        rows: the data set.
        sampler: the order of its rows.
        position: returns how many batches of this epoch have been trained on.
        options: a DataLoader's own.
    """

    def __init__(self, rows: BatchDataset, sampler: EpochSampler, position: Callable[[], int], **options: Any) -> None:
        super().__init__(rows, sampler=sampler, drop_last=True, **options)
        self.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the remaining batches of the epoch."""
        assert isinstance(self.sampler, EpochSampler)
        assert self.batch_size is not None
        self.sampler.skip = self.position() * self.batch_size
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's counters are its place. Lightning warns of loaders without this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class ResumableData(L.LightningDataModule):
    """The loader over `train`, which a subclass fills in `setup`; it keeps its place.

    A run stopped in the middle of an epoch resumes with the next batch, with any number of workers. `val_dataloader`,
    which a subclass adds, is the loader of the reference for tests too.

    Args:
        batch_size: images per training batch on each device, at least 1.
        reference_size: at most this number of reference images, at least 1; None for all.
        num_workers: loading processes, at least 0. They live as long as the run.

    Attributes:
        variants: of each row of `train`.

    Raises:
        ValueError: if a number is below its minimum.
    """

    num_classes: int
    train: BatchDataset
    variants = 1

    def __init__(self, batch_size: int, reference_size: int | None, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")
        if reference_size is not None and reference_size < 1:
            raise ValueError(f"reference_size must be at least 1: got {reference_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0: got {num_workers}")
        self.batch_size = batch_size
        self.reference_size = reference_size
        self.num_workers = num_workers
        self.seed = torch.initial_seed() % 2**31

    def train_dataloader(self) -> EpochLoader:
        """Return shuffled training batches, the last incomplete one left out; each process gets its own.

        Raises:
            ValueError: if there are too few images for one batch in each process: Lightning would train no step.
        """
        trainer = self.trainer
        world = trainer.world_size if trainer else 1
        if len(self.train) < world * self.batch_size:
            needed = f"{world} processes with batch_size {self.batch_size} need {world * self.batch_size}"
            raise ValueError(f"too few training images: {needed}, got {len(self.train)}")
        return EpochLoader(self.train, self._order(), self._position, batch_size=self.batch_size, **self.options())

    def options(self) -> dict[str, Any]:
        """Return what all loaders share: workers, which live as long as the run, and pinned memory before a GPU.

        Raises:
            ValueError: if the trainer has overfit_batches, for which Lightning replaces the order of the rows.
        """
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            remedy = "give trainer.limit_train_batches and trainer.limit_val_batches, or a data set of few images"
            raise ValueError(f"trainer.overfit_batches does not work with {type(self).__name__}: {remedy}")
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": on_gpu,
            "collate_fn": as_it_is,
        }

    def place(self, batch_idx: int, row: int) -> str:
        """Return where a row of this epoch's training batch number `batch_idx` comes from."""
        assert self.trainer is not None
        order = self._order()
        order.set_epoch(self.trainer.current_epoch)
        return self.train.place(next(islice(iter(order), batch_idx * self.batch_size + row, None)))

    def check_network(self, what: str, shape: tuple[int, ...]) -> None:
        """Refuse data whose samples have another shape than those of the network.

        Raises:
            ValueError: beginning with `what`, and naming both shapes.
        """
        module = self.trainer.lightning_module if self.trainer else None
        if isinstance(module, HasNetwork):
            check_fit(module.network, shape=shape, what=what)

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of the reference, in order."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[int]:
        """Return one empty turn: a callback, such as SampleWriter, generates the samples."""
        return [0]

    def evenly(self, rows: Dataset[Batch]) -> DataLoader[Batch]:
        """Return a loader of all rows in order, split evenly among the processes, each row once."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = EvenBatches(rows, EVALUATED_AT_ONCE, rank, world)
        return DataLoader(rows, batch_size=None, sampler=batches, **self.options())

    def decode(self, x: Sample) -> Sample:
        """Return the images in [-1, 1] of the network's samples: pixels are images already."""
        return x

    def state_dict(self) -> dict[str, int]:
        """Return the seed of the order."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over the order of the run that is resumed."""
        self.seed = state_dict["seed"]

    def _order(self) -> EpochSampler:
        trainer = self.trainer
        return EpochSampler(
            self.train,
            self.variants,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self.seed,
        )

    def _position(self) -> int:
        trainer = self.trainer
        # Lightning restores it before the first batch. Others than the fit, such as a metric, begin at the first batch.
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer and trainer.training else 0


def as_it_is(batch: Batch) -> Batch:
    """Return what `BatchDataset` made a batch already."""
    return batch
