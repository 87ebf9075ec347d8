"""The loaders of all data modules: a training loader that resumes within an epoch, and loaders of reference data."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from decm_lightning.autoencoders import LatentCoder
from decm_lightning.data.fit import check_fit
from decm_lightning.data.protocol import HasNetwork
from decm_lightning.errors import check_at_least
from decm_lightning.even_split import EvenBatches
from decm_lightning.networks.record import Record, Reference
from decm_lightning.seeds import generator_of, seed_of_run
from decm_lightning.text import CaptionEncoder
from decm_lightning.types import Batch, Sample

EVALUATED_AT_ONCE = 256


class BatchDataset(Dataset[Batch]):
    """A data set that is read one batch at a time.

    Rows may have variants, such as mirrored images or several captions. Of N rows, item N k + i is variant k of row i.
    """

    def __len__(self) -> int:
        """Return the number of rows."""
        raise NotImplementedError

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""
        raise NotImplementedError

    def identity(self) -> str:
        """Return a hash of the rows; "" if they are not hashed."""
        return ""

    def place(self, item: int) -> str:
        """Return where an item comes from, for error messages: its file and row, or its number."""
        return f"image {item}"

    def __getitem__(self, items: int | Sequence[int]) -> Batch:
        """Return the batch of the given items, or of one item."""
        return self.__getitems__([items] if isinstance(items, int) else items)


class EpochSampler(DistributedSampler[int]):
    """Sample the shuffled rows of an epoch from row `skip` on, each in one variant, as items of a `BatchDataset`.

    Order and variants depend only on the seed and the epoch, not on the number of processes or workers. The order of a
    RandomSampler depends on all earlier random numbers, so a resumed run could not repeat it.
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
    """A DataLoader that starts at the next untrained batch of the epoch.

    `position`, the number of batches of this epoch that have been trained on, is read when the first batch is
    requested. A resumed run therefore continues with the right batch, with any number of workers and without saved
    state.
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
        """Return an empty state: the trainer counts the batches. Lightning warns about loaders without this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state, which is empty."""


class ResumableData(L.LightningDataModule):
    """Base class of data modules whose training loader resumes within an epoch.

    A run that is interrupted in the middle of an epoch resumes with the next batch, with any number of workers. A
    subclass sets `train`, and `reference` for validation and test, in `setup`.

    Args:
        batch_size: images per training batch on each device, at least 1.
        reference_size: maximum number of reference images, at least 1; None for all.
        num_workers: number of loading processes, at least 0; 0 is fastest for data in memory. They live as long as the
            run.

    Attributes:
        seed: seed of the shuffling, to be set before `fit`; None for the seed of `L.seed_everything` when `fit` starts.
            A resumed run uses its checkpoint's.
        train: the training data.
        reference: the data for validation and test; None for no loaders.
        variants: number of variants of each row of `train`.
        class_names: names of the classes by label; empty if unknown.
        data_name: path or name of the data; "" for the name of the class.
        license: license of the data as an SPDX identifier; "" if unknown.
        vae: where the VAE of the latents is; None for images.
        coder: the loaded VAE with the normalization of the latents; None for images.
        encoder: the text encoder; None without captions.

    Raises:
        ValueError: if a number is below its minimum.
    """

    num_classes: int
    train: BatchDataset
    reference: BatchDataset | None = None
    variants = 1
    class_names: Sequence[str] = ()
    data_name = ""
    license = ""
    vae: str | None = None
    coder: LatentCoder | None = None
    encoder: CaptionEncoder | None = None

    def __init__(self, batch_size: int = 128, reference_size: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, reference_size=reference_size)
        check_at_least(0, num_workers=num_workers)
        self.batch_size = batch_size
        self.reference_size = reference_size
        self.num_workers = num_workers
        self.seed: int | None = None
        self.run_seed: int | None = None
        self.built_seed = torch.initial_seed()

    @property
    def device(self) -> torch.device:
        """The device that encodes captions and images: the trainer's, or else the accelerator of this machine."""
        if self.trainer:
            return self.trainer.strategy.root_device
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def train_dataloader(self) -> EpochLoader:
        """Return the shuffled training batches of this process. An incomplete last batch is dropped.

        Raises:
            ValueError: if there is less than one batch for each process, because Lightning would train for zero steps.
        """
        trainer = self.trainer
        world = trainer.world_size if trainer else 1
        if len(self.train) < world * self.batch_size:
            needed = f"{world} processes with batch_size {self.batch_size} need {world * self.batch_size}"
            raise ValueError(f"too few training images: {needed}, got {len(self.train)}")
        return EpochLoader(self.train, self._order(), self._position, batch_size=self.batch_size, **self.options())

    def options(self) -> dict[str, Any]:
        """Return the options of all loaders: workers that live as long as the run, and pinned memory for GPUs.

        Raises:
            ValueError: if the trainer sets overfit_batches, because Lightning would replace the order of the rows.
        """
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            remedy = "set trainer.limit_train_batches and trainer.limit_val_batches, or use a small data set"
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
        """Check that the samples have the shape that the network expects.

        Raises:
            ValueError: if they have another shape. The message begins with `what` and gives both shapes.
        """
        module = self.trainer.lightning_module if self.trainer else None
        if isinstance(module, HasNetwork):
            check_fit(module.network, shape=shape, what=what)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the reference data, in order."""
        if self.reference is None:
            return []
        return self.evenly(Subset(self.reference, range(len(self.reference))[: self.reference_size]))

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the reference data, in order."""
        return self.val_dataloader()

    def predict_dataloader(self) -> list[int]:
        """Return one dummy batch, because a callback such as SampleWriter generates the samples."""
        return [0]

    def evenly(self, rows: Dataset[Batch]) -> DataLoader[Batch]:
        """Return a loader of all rows in order. They are split evenly among the processes, without repeats."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = EvenBatches(rows, EVALUATED_AT_ONCE, rank, world)
        return DataLoader(rows, batch_size=None, sampler=batches, **self.options())

    def decode(self, x: Sample) -> Sample:
        """Return the network's samples as images in [-1, 1]. Latents are decoded if there is a VAE."""
        return x if self.coder is None else self.coder.decode(x)

    def release(self) -> None:
        """Move the VAE off the accelerator, because only evaluation uses it."""
        if self.coder is not None:
            self.coder.autoencoder.to("cpu")

    def identity(self) -> dict[str, str]:
        """Return the identities of the VAE and of the text encoder, if they are used."""
        vae = {"VAE": self.coder.autoencoder.identity} if self.coder else {}
        return vae | ({"encoder": self.encoder.identity} if self.encoder else {})

    def record(self) -> Record:
        """Return the record of a network, as far as the data determine it. Call it after `setup`."""
        coder, encoder = self.coder, self.encoder
        return Record(
            class_names=tuple(self.class_names),
            data=Reference(self.data_name or type(self).__name__, self.train.identity(), self.license),
            text_encoder=Reference(encoder.name, encoder.identity) if encoder else None,
            vae=Reference(self.vae or "", coder.autoencoder.identity) if coder else None,
            latents=coder.normalization.as_json() if coder else None,
        )

    def state_dict(self) -> dict[str, int]:
        """Return the seed of the shuffling."""
        return {"seed": self._current_seed()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the seed of the shuffling."""
        self.run_seed = state_dict["seed"]

    def teardown(self, stage: str) -> None:
        """Let the next run use its own seed."""
        if stage == "fit":
            self.run_seed = None

    def on_exception(self, exception: BaseException) -> None:
        """Let the next run use its own seed, because Lightning does not call teardown after an error."""
        self.run_seed = None

    def _current_seed(self) -> int:
        """Return the seed, which does not change during a run."""
        if self.run_seed is not None:
            return self.run_seed
        seed = seed_of_run(self.seed, self.built_seed) % 2**31
        if self.trainer and self.trainer.training:
            self.run_seed = seed
        return seed

    def _order(self) -> EpochSampler:
        trainer = self.trainer
        return EpochSampler(
            self.train,
            self.variants,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=self._current_seed(),
        )

    def _position(self) -> int:
        trainer = self.trainer
        # Lightning restores this counter before the first batch. Reads outside of fit start at the first batch.
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer and trainer.training else 0


def as_it_is(batch: Batch) -> Batch:
    """Return a batch unchanged, because `BatchDataset` has already collated it."""
    return batch
