"""Images into a folder of latents, by Trainer.predict on all devices, finished whenever it is started often enough."""

from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int, UInt8
from numpy.random import SeedSequence
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from decm_lightning.autoencoders import Autoencoder
from decm_lightning.data.image_files import ImageFiles
from decm_lightning.data.manifest import Manifest
from decm_lightning.data.scaling import Moments
from decm_lightning.data.shards import KEYS
from decm_lightning.errors import NonFiniteError

Posterior = Literal["sample", "mode"]


class Portion(NamedTuple):
    """Neighbouring images of one shard.

    Attributes:
        shard: the number of the shard.
        numbers: those of the images, (b,).
        pixels: (b, 3, h, w); empty if there is a fault.
        labels: (b,).
        fault: what is wrong with an image, "" if all are whole.
    """

    shard: int
    numbers: Int[Tensor, " b"]
    pixels: UInt8[Tensor, "b 3 h w"]
    labels: Int[Tensor, " b"]
    fault: str


class Encoded(NamedTuple):
    """The latents of images and of their mirror images, (b, c, h, w) each."""

    latents: Float[Tensor, "b c h w"]
    mirrored: Float[Tensor, "b c h w"]


class Portions(Dataset[Portion]):
    """The images of some shards, a batch an item.

    Batches begin anew with each shard, so that a shard is computed in the same batches whoever encodes it.

    Args:
        images: what to read.
        size: height and width to crop to.
        shards: the numbers of the shards, with the images of each.
        batch_size: images in each batch but a shard's last, at least 1.

    Raises:
        ValueError: if batch_size is below 1.
    """

    def __init__(self, images: ImageFiles, size: int, shards: dict[int, range], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")
        self.images = images
        self.size = size
        self.batches = [
            (shard, numbers[start : start + batch_size])
            for shard, numbers in shards.items()
            for start in range(0, len(numbers), batch_size)
        ]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Portion:
        """Return a batch, with the first of its images that is broken as its fault."""
        shard, numbers = self.batches[index]
        labels = torch.tensor([self.images.files[number].label for number in numbers])
        try:
            pixels, fault = torch.stack([self.images.read(number, self.size) for number in numbers]), ""
        # An error raised in a loading process would reach the user under two tracebacks.
        except ValueError as error:
            pixels, fault = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8), str(error)
        return Portion(shard, torch.tensor(numbers), pixels, labels, fault)

    def loader(self, num_workers: int) -> DataLoader[Portion]:
        """Return the loader of the batches in order."""
        return DataLoader(self, batch_size=1, num_workers=num_workers, collate_fn=_only)


class Encoding(L.LightningModule):
    """The autoencoder at work: `predict_step` encodes images in [-1, 1] and their mirror images.

    Args:
        autoencoder: what encodes.
        posterior: "sample" takes mean + std noise, as LightningDiT does, "mode" the mean.
        seed: of the noise. It depends on the seed and on the image's number alone, so that neither the number of
            devices nor where a run was killed can be seen in the latents; it is drawn on the CPU, as each kind of
            device has a generator of its own.
    """

    def __init__(self, autoencoder: Autoencoder, posterior: Posterior = "sample", seed: int = 0) -> None:
        super().__init__()
        # Where there are more processes than shards left, some have nothing to do.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.autoencoder = autoencoder
        self.posterior = posterior
        self.seed = seed

    def predict_step(self, batch: Portion, batch_idx: int) -> Encoded:
        """Return the latents.

        Raises:
            ValueError: if an image is broken.
            NonFiniteError: if a latent is NaN or infinite.
        """
        if batch.fault:
            raise ValueError(f"{batch.fault}; put a whole one there and start again: finished shards are kept")
        images = batch.pixels.float() / 127.5 - 1
        both = torch.cat([images, images.flip(-1)])
        encoded = self.autoencoder.encode(both, self._noise(batch.numbers, images.shape[-1]))
        bad = encoded.isfinite().flatten(1).all(1).logical_not()
        if bad.any():
            number = int(batch.numbers[int(bad.nonzero()[0]) % len(images)])
            raise NonFiniteError(f"the latent of image {number} is NaN or infinite: the VAE or its precision is broken")
        return Encoded(*encoded.chunk(2))

    def _noise(self, numbers: Int[Tensor, " b"], size: int) -> Float[Tensor, "b2 c h w"] | None:
        if self.posterior == "mode":
            return None
        drawn = []
        for number in numbers.tolist():
            generator = torch.Generator().manual_seed(int(SeedSequence((self.seed, number)).generate_state(1)[0]))
            drawn.append(torch.randn(2, *self.autoencoder.latent_shape(size), generator=generator))
        return torch.cat(list(torch.stack(drawn, 1))).to(self.device)


class ShardWriter(L.Callback):
    """Writes a shard as soon as its last batch is encoded.

    Args:
        manifest: the folder.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.parts: list[tuple[Tensor, ...]] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Portion,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch, and write the shard if it is complete."""
        self.parts.append((outputs.latents.cpu(), outputs.mirrored.cpu(), batch.labels.cpu()))
        if int(batch.numbers[-1]) != self.manifest.shards[batch.shard][-1]:
            return
        columns = zip(KEYS, zip(*self.parts, strict=True), strict=True)
        # Convolutions may leave the channels last.
        tensors = {key: torch.cat(parts).contiguous() for key, parts in columns}
        self.parts = []
        moments = Moments(outputs.latents.shape[1])
        for key in KEYS[:2]:
            moments.add(tensors[key].double())
        self.manifest.write(batch.shard, tensors, moments)


def _only(items: list[Portion]) -> Portion:
    return items[0]
