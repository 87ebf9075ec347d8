"""Images as latents of a VAE, in LightningDiT's format: normalised, mirrored at random, and checked before training."""

import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from numpy.random import SeedSequence
from torch import Tensor
from torch.utils.data import DistributedSampler

from decm_lightning.data.images import ResumableData, Rows
from decm_lightning.data.shards import RECORD, Provenance, Shards
from decm_lightning.types import Batch

STATISTICS = "latents_stats.pt"
SAMPLE = 1000
BLOCK = 64


@dataclass(frozen=True)
class Scaling:
    """What makes latents of mean 0 and standard deviation 1: (x - mean) / std * multiplier, in float32.

    Args:
        mean: (1, c, 1, 1).
        std: (1, c, 1, 1), above 0.
        multiplier: 1 where there are statistics; 0.18215 for Stable Diffusion's VAE without them.
    """

    mean: Float[Tensor, "1 c 1 1"]
    std: Float[Tensor, "1 c 1 1"]
    multiplier: float

    def __call__(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the scaled latents."""
        return (x - self.mean) / self.std * self.multiplier

    @classmethod
    def read(cls, file: Path, channels: int, multiplier: float) -> "Scaling":
        """Return the scaling by a file of {"mean", "std"}, each (1, channels, 1, 1).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it has other content.
        """
        if not file.is_file():
            raise FileNotFoundError(f"no file {file}: give the statistics of the latents, or set latent_norm to false")
        try:
            content = torch.load(file, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is no file of tensors: {str(error).partition(chr(10))[0]}") from error
        for name in ("mean", "std"):
            value = content.get(name) if isinstance(content, dict) else None
            if not isinstance(value, Tensor) or value.shape != (1, channels, 1, 1) or not value.isfinite().all():
                found = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ValueError(f"{file}: {name} must be finite and (1, {channels}, 1, 1): got {found}")
        if (content["std"] <= 0).any():
            raise ValueError(f"{file}: std must be above 0: got {content['std'].min():g}")
        return cls(content["mean"].float(), content["std"].float(), multiplier)


class Moments:
    """Mean and standard deviation of each channel over blocks of latents, gathered in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.square = torch.zeros(channels, dtype=torch.float64)

    def add(self, x: Float[Tensor, "b c h w"]) -> None:
        """Take in a block."""
        variance, mean = (value.double() for value in torch.var_mean(x, (0, 2, 3), correction=0))
        self.count += len(x)
        share = len(x) / self.count
        self.mean += share * (mean - self.mean)
        self.square += share * (variance + mean.square() - self.square)

    def overall(self) -> tuple[float, float]:
        """Return mean and standard deviation over all channels together."""
        mean = self.mean.mean()
        return mean.item(), (self.square.mean() - mean.square()).clamp(min=0).sqrt().item()


class Latents(Rows):
    """Scaled latents with their labels, fetched a batch at a time; of N, item N + i is image i mirrored.

    Args:
        folder: safetensors shards and latents_stats.pt, with cache.json if it is known where they come from.
        num_classes: labels must be below it; None for what cache.json says, or one more than the largest label.
        latent_norm: subtract latents_stats.pt's mean and divide by its std.
        latent_multiplier: times this, above 0.

    Raises:
        FileNotFoundError: if the folder, its shards or latents_stats.pt is missing.
        ValueError: naming the file, and the row if it is one, that is not as it should be.
    """

    def __init__(
        self, folder: str | Path, num_classes: int | None, latent_norm: bool = True, latent_multiplier: float = 1.0
    ) -> None:
        if latent_multiplier <= 0:
            raise ValueError(f"latent_multiplier must be above 0: got {latent_multiplier}")
        self.provenance = Provenance.read(folder)
        if num_classes is None and self.provenance is not None:
            num_classes = self.provenance.num_classes
        self.shards = Shards(folder, num_classes)
        self.latent_norm = latent_norm
        channels, statistics = self.shards.shape[0], self.shards.folder / STATISTICS
        if latent_norm:
            self.scaling = Scaling.read(statistics, channels, latent_multiplier)
        else:
            ones = torch.ones(1, channels, 1, 1)
            self.scaling = Scaling(0 * ones, ones, latent_multiplier)
        if self.provenance is None:
            rank_zero_warn(
                f"no {RECORD} in {folder}: the VAE of these latents is unknown, and if another one decodes what is "
                "drawn, it looks wrong whatever the loss"
            )
            return
        self.provenance.check(self.shards, {"latent_norm": latent_norm, "latent_multiplier": latent_multiplier})
        if latent_norm:
            self.provenance.check_file(statistics)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.shards)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Return the batch of the given items."""
        labels = self.shards.labels[torch.as_tensor(items) % len(self)]
        return Batch(self.scaling(self.shards.read(items)), labels)

    def sample(self) -> list[range]:
        """Return at most 1,000 images, plain and mirrored, as blocks of items for `measure`."""
        # Spread over all shards: the first rows of an encoded ImageNet are all of one class.
        count, step = len(self), math.ceil(len(self) / SAMPLE)
        return [
            range(start, min(start + BLOCK * step, end), step)
            for first, end in ((0, count), (count, 2 * count))
            for start in range(first, end, BLOCK * step)
        ]

    def everything(self) -> list[range]:
        """Return all images, plain and mirrored, as blocks of items for `measure`."""
        return [range(start, min(start + BLOCK, 2 * len(self))) for start in range(0, 2 * len(self), BLOCK)]

    def measure(self, blocks: Iterable[Sequence[int]]) -> Moments:
        """Return the moments of the scaled items, after a look at every number.

        Raises:
            ValueError: naming the file and row of a latent that is not finite, or if mean and standard deviation are
                far from 0 and 1.
        """
        moments = Moments(self.shards.shape[0])
        for items in blocks:
            x = self.shards.read(items)
            bad = x.isfinite().flatten(1).all(1).logical_not()
            if bad.any():
                raise ValueError(f"{self.shards.place(items[int(bad.nonzero()[0])])} is NaN or infinite")
            moments.add(self.scaling(x))
        self._check_scale(moments)
        return moments

    def _check_scale(self, moments: Moments) -> None:
        mean, std = moments.overall()
        # A multiplier leaves the mean alone: 0.18215 takes Stable Diffusion's latents of ImageNet to 0.32.
        limit = 0.3 if self.latent_norm else 1.0
        if abs(mean) < limit and 0.5 < std < 2:
            return
        if not self.latent_norm:
            way = "x, unnormalised (latent_norm is false)"
            remedy = f"set latent_norm to true, or latent_multiplier to {self.scaling.multiplier / max(std, 1e-8):.3g}"
        elif self.scaling.multiplier != 1:
            way, remedy = f"(x - mean) / std of {STATISTICS}", "with statistics latent_multiplier is 1"
        else:
            way = f"(x - mean) / std of {STATISTICS}"
            remedy = f"were they normalised before they were written, or is {STATISTICS} of other latents?"
        raise ValueError(
            f"latents of {self.shards.folder} have mean {mean:.3g} and standard deviation {std:.3g} after {way}, times "
            f"{self.scaling.multiplier:g}: expected 0 and 1, about; {remedy}"
        )


class MirroringSampler(DistributedSampler[int]):
    """DistributedSampler that mirrors half of the images: of N, it gives item N + i for image i mirrored.

    Whether it does follows from the seed, the epoch and i alone, whatever the number of processes and workers.
    """

    def __iter__(self) -> Iterator[int]:
        entropy = SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        count = len(self.dataset)  # type: ignore[arg-type]
        mirrored = torch.randint(2, (count,), generator=generator, dtype=torch.uint8).numpy()
        return (row + count * int(mirrored[row]) for row in super().__iter__())


class ImageNetLatents(ResumableData):
    """Latents with labels from LightningDiT's shards, (c, h, w) of mean 0 and standard deviation 1; all of them train.

    The folder holds `*.safetensors` with `latents` (n, c, h, w), `latents_flip` and `labels`, and `latents_stats.pt`.
    Rows are read as they are needed. Headers, labels and about 1,000 rows are checked before training starts; `decm
    validate-data` looks at every row. There are no loaders for validation, test and prediction: the distances want
    pictures, and latents can be decoded only by their VAE.

    Args:
        folder: where the files are.
        batch_size: images per training batch on each device, at least 1.
        num_workers: loading processes on each device: they hide a slow disk; 0 is fastest for files in memory.
        num_classes: labels must be below it.
        latent_norm: subtract latents_stats.pt's mean and divide by its std, as for VA-VAE.
        latent_multiplier: times this, above 0; with latent_norm false 0.18215 for Stable Diffusion's VAE.
        flip: mirror half of the images, others in each epoch.
    """

    train: Latents

    def __init__(
        self,
        folder: str,
        batch_size: int = 128,
        num_workers: int = 2,
        num_classes: int = 1000,
        latent_norm: bool = True,
        latent_multiplier: float = 1.0,
        flip: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.folder = folder
        self.num_classes = num_classes
        self.latent_norm = latent_norm
        self.latent_multiplier = latent_multiplier
        if flip:
            self.sampler = MirroringSampler

    def setup(self, stage: str) -> None:
        """Open the folder and check a sample of it.

        Raises:
            FileNotFoundError: if the folder, its shards or latents_stats.pt is missing.
            ValueError: naming what is not as it should be, or if the network is for samples of another shape.
        """
        self.train = Latents(self.folder, self.num_classes, self.latent_norm, self.latent_multiplier)
        self.train.measure(self.train.sample())
        network = getattr(self.trainer and self.trainer.lightning_module, "network", None)
        wanted = getattr(network, "sample_shape", self.train.shards.shape)
        if tuple(wanted) != self.train.shards.shape:
            raise ValueError(f"latents of {self.folder} are {self.train.shards.shape}: the network makes {wanted}")
