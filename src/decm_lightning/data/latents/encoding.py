"""Encode images into a folder of latents with Trainer.predict on all devices. Interrupted runs resume."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from decm_lightning.autoencoders import Autoencoder
from decm_lightning.autoencoders.normalization import Moments
from decm_lightning.data.images.image_files import ImageFiles, OnError
from decm_lightning.data.latents.manifest import Manifest, Shard
from decm_lightning.data.latents.shards import KEYS
from decm_lightning.errors import NonFiniteError, check_at_least
from decm_lightning.image_listing import broken
from decm_lightning.image_reader import in_threads, read_modes
from decm_lightning.progress import Progress
from decm_lightning.seeds import generator_of
from decm_lightning.signals import end_at_signals, silence_broken_pipes

Posterior = Literal["sample", "mode"]


class ShardBatch(NamedTuple):
    """Consecutive images of the shard with this number in the plan; the shard ends with the last one.

    `names`, `pixels` and `labels` are those of the images that could be read, `errors` has those of the others by name.
    """

    shard: int
    is_last: bool
    names: list[str]
    pixels: UInt8[Tensor, "b 3 h w"]
    labels: Int[Tensor, " b"]
    errors: dict[str, str]


class ShardBatches(Dataset[ShardBatch]):
    """The images of some shards, by the shards' numbers, cropped to size x size. Each item is a batch.

    Each shard starts a new batch, so its batches are the same whichever process encodes it.
    """

    def __init__(self, images: ImageFiles, size: int, shards: dict[int, Shard], batch_size: int) -> None:
        self.images = images
        self.size = size
        self.batches = [
            (number, shard.images[start : start + batch_size], start + batch_size >= len(shard.images))
            for number, shard in shards.items()
            for start in range(0, len(shard.images), batch_size)
        ]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> ShardBatch:
        """Return a batch."""
        shard, numbers, is_last = self.batches[index]
        names, pixels, labels, errors = [], [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)], [], {}
        for number in numbers:
            image = self.images.files[number]
            # An error that is raised in a loading process reaches the user with two tracebacks.
            try:
                pixels.append(self.images.read(number, self.size)[None])
            except ValueError as error:
                errors[image.name] = str(error).removeprefix(f"{image.name} ")
                continue
            names.append(image.name)
            labels.append(image.label)
        return ShardBatch(shard, is_last, names, torch.cat(pixels), torch.tensor(labels, dtype=torch.long), errors)


@dataclass
class Plan:
    """All shards of an encoding, and the numbers of those that must be encoded."""

    shards: list[Shard]
    pending: list[int]


class EncodingData(L.LightningDataModule):
    """The batches of all shards that must be encoded, split among the processes.

    Only the first process compares the images with the folder. It also checks the headers of all images to encode,
    before it changes the folder.
    """

    def __init__(
        self, images: ImageFiles, manifest: Manifest, size: int, batch_size: int, num_workers: int, on_error: OnError
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        self.images = images
        self.manifest = manifest
        self.size = size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_error = on_error
        self.plan = Plan([], [])

    def setup(self, stage: str) -> None:
        """Plan the encoding and write the settings into the folder."""
        assert self.trainer is not None
        outcome: Plan | Exception | None = None
        if self.trainer.is_global_zero:
            # The error is broadcast, so that all processes stop.
            try:
                outcome = self._planned()
            except (OSError, ValueError) as error:
                outcome = error
        outcome = self.trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        self.plan = outcome

    def predict_dataloader(self) -> DataLoader[ShardBatch]:
        """Return the batches of this process, in order."""
        assert self.trainer is not None
        ours = self.plan.pending[self.trainer.global_rank :: self.trainer.world_size]
        shards = {number: self.plan.shards[number] for number in ours}
        batches = ShardBatches(self.images, self.size, shards, self.batch_size)
        quiet = silence_broken_pipes
        return DataLoader(batches, num_workers=self.num_workers, collate_fn=_only, worker_init_fn=quiet)

    def _planned(self) -> Plan:
        files, allow_skipped = self.images.files, self.on_error == "skip"
        self.manifest.lock()
        shards = self.manifest.plan([file.order for file in files], list(in_threads(self.images.identity, files)))
        done = in_threads(lambda shard: self.manifest.is_up_to_date(shard, allow_skipped), shards)
        pending = [number for number, is_done in enumerate(done) if not is_done]
        if pending:
            if len(pending) < len(shards):
                finished = len(shards) - len(pending)
                print(f"{finished} of {len(shards)} shards are up to date, encoding the other {len(pending)}")
            self._check_headers([image for number in pending for image in shards[number].images])
            self.manifest.begin()
        return Plan(shards, pending)

    def _check_headers(self, numbers: Sequence[int]) -> None:
        places = [self.images.files[number].place for number in numbers]
        found = Progress(read_modes(places), desc="checking image headers", total=len(places), unit="image")
        errors = {
            self.images.files[number].name: str(error)
            for number, error in zip(numbers, found, strict=True)
            if isinstance(error, ValueError)
        }
        if errors and self.on_error == "raise":
            raise ValueError(f"{broken(errors)}: replace or delete them, or leave them out with --on_error skip")


class Encoding(L.LightningModule):
    """The LightningModule for Trainer.predict. It encodes images and their mirror images, and writes whole shards.

    Args:
        autoencoder: the VAE that encodes the images.
        data: the images, the output folder, and whether to stop at a broken image.
        posterior: "sample" for mean + std * noise, as in LightningDiT, or "mode" for the mean.
        seed: seed of the noise. The noise depends only on the seed and the name of the image, so the latents do not
            depend on the number of devices, on interruptions or on the other images. Noise is sampled on the CPU,
            because generators differ between devices.
    """

    def __init__(
        self, autoencoder: Autoencoder, data: EncodingData, posterior: Posterior = "sample", seed: int = 0
    ) -> None:
        super().__init__()
        # A process without a shard has an empty loader.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.autoencoder = autoencoder
        self.data = data
        self.posterior = posterior
        self.seed = seed
        self.parts: list[tuple[Tensor, ...]] = []
        self.skipped: dict[str, str] = {}

    def setup(self, stage: str) -> None:
        """Stop the encoding on SIGTERM. The same command resumes it."""
        end_at_signals(self.trainer)

    def predict_step(self, batch: ShardBatch, batch_idx: int) -> Float[Tensor, "b2 c h w"]:
        """Return the latents of a batch and of its mirror images. The last batch of a shard writes the shard."""
        if batch.errors and self.data.on_error == "raise":
            remedy = "replace it, or leave it out with --on_error skip, and run again: finished shards are reused"
            raise ValueError(f"{broken(batch.errors)}; {remedy}")
        encoded = self._encoded(batch)
        # Convolutions may return tensors in channels-last order.
        latents, mirrored = encoded.cpu().contiguous().chunk(2) if len(encoded) else (encoded, encoded)
        self.parts.append((latents, mirrored, batch.labels.cpu()))
        self.skipped |= batch.errors
        if batch.is_last:
            self._write(batch.shard)
        return encoded

    def _encoded(self, batch: ShardBatch) -> Float[Tensor, "b2 c h w"]:
        size = batch.pixels.shape[-1]
        if not batch.names:
            return torch.empty(0, *self.autoencoder.latent_shape(size))
        images = batch.pixels.float() / 127.5 - 1
        both = torch.cat([images, images.flip(-1)])
        encoded = self.autoencoder.encode(both, self._noise(batch.names, size))
        bad = encoded.isfinite().flatten(1).all(1).logical_not()
        if bad.any():
            name = batch.names[int(bad.nonzero()[0]) % len(images)]
            raise NonFiniteError(f"the latent of {name} is NaN or infinite: check the VAE and its precision")
        return encoded

    def _write(self, number: int) -> None:
        tensors = {key: torch.cat(parts) for key, parts in zip(KEYS, zip(*self.parts, strict=True), strict=True)}
        moments = Moments(self.autoencoder.latent_channels)
        for key in KEYS[:2]:
            if len(tensors[key]):
                moments.add(tensors[key].double())
        self.data.manifest.write(self.data.plan.shards[number], tensors, moments, self.skipped)
        self.parts, self.skipped = [], {}

    def _noise(self, names: Sequence[str], size: int) -> Float[Tensor, "b2 c h w"] | None:
        if self.posterior == "mode":
            return None
        shape = self.autoencoder.latent_shape(size)
        noise = [torch.randn(2, *shape, generator=_generator(self.seed, name)) for name in names]
        return torch.cat(list(torch.stack(noise, 1))).to(self.device)


def _generator(seed: int, name: str) -> torch.Generator:
    return generator_of(seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:16]))


def _only(items: list[ShardBatch]) -> ShardBatch:
    return items[0]
