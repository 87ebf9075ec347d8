"""Check a folder of latents for `decm validate-data`: find all errors, and compute statistics by channel."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from decm_lightning.autoencoders import Autoencoder, LatentCoder
from decm_lightning.autoencoders.normalization import LatentNormalization, Moments, finite_rows
from decm_lightning.autoencoders.provenance import Provenance
from decm_lightning.data.latents.shards import KEYS, Shards
from decm_lightning.progress import Progress

NAMED = 10
"""Maximum number of non-finite rows that are named; all are counted."""


class ErrorReport:
    """The errors of a folder, each reported immediately in one line and counted by kind."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self.report = report
        self.counts: Counter[str] = Counter()
        self.first = ""

    def add(self, kind: str, what: Exception | str, count: int = 1) -> None:
        """Report an error. Its kind is a singular noun, and its count is 0 if it has already been counted."""
        named = isinstance(what, OSError) and what.filename is not None
        line = f"{what.filename}: {what.strerror}" if named else str(what)  # type: ignore[union-attr]
        self.report(line)
        self.first = self.first or line
        self.counts[kind] += count

    @contextmanager
    def collect(self, kind: str) -> Iterator[None]:
        """Report a ValueError or OSError that the block raises."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.add(kind, error)

    def check(self, folder: str) -> None:
        """Raise ValueError if there are errors. The message has the number by kind and the first error."""
        if total := self.counts.total():
            kinds = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in self.counts.items() if count)
            raise ValueError(f"{total} error{'s' * (total > 1)} in {folder} ({kinds}), the first: {self.first}")


class FolderCheck:
    """Open a folder of latents despite errors, and compute statistics of its rows.

    `shards` contains the usable files. `provenance` and `normalization` are None if they are missing or unusable.
    `read` computes the statistics of the finite rows, normalized if possible: `moments`, and `minimum` and `maximum` of
    each channel (c,). `example` is the first finite row (1, c, h, w).
    """

    def __init__(
        self, folder: str, num_classes: int | None, latent_norm: bool, latent_multiplier: float, errors: ErrorReport
    ) -> None:
        self.errors = errors
        self.provenance: Provenance | None = None
        self.normalization: LatentNormalization | None = None
        with errors.collect("record"):
            self.provenance = Provenance.read(folder)
        if num_classes is None and self.provenance is not None:
            num_classes = self.provenance.num_classes
        self.shards = Shards(folder, num_classes, errors.add)
        channels = self.shards.shape[0]
        with errors.collect("statistics file"):
            self.normalization = LatentNormalization.read(folder, channels, latent_norm, latent_multiplier)
        if self.provenance is not None:
            scaling = {"latent_norm": latent_norm, "latent_multiplier": latent_multiplier}
            for difference in self.provenance.differences(self.shards, scaling):
                errors.add("record", difference)
        self.moments = Moments(channels)
        self.minimum, self.maximum = torch.full((2, channels), torch.inf).mul(torch.tensor([[1.0], [-1.0]]))
        self.example: Float[Tensor, "1 c h w"] | None = None

    def check_checksums(self) -> None:
        """Compare the files in cache.json with their checksums."""
        if self.provenance is None:
            return
        files = [self.shards.folder / name for name in sorted(self.provenance.checksums)]
        for file in Progress([file for file in files if file.is_file()], desc="checksums", unit="file"):
            with self.errors.collect("checksum"):
                self.provenance.check_file(file)

    def read(self) -> None:
        """Read all latents, plain and mirrored. Non-finite rows are errors and are left out of the statistics."""
        bad: list[int] = []
        with Progress(total=2 * len(self.shards), desc="latents", unit="latent") as bar:
            for items in self.shards.blocks():
                x = self.shards.read(items)
                finite = finite_rows(x)
                for row in finite.logical_not().nonzero().flatten().tolist():
                    bad.append(items[row])
                    if len(bad) <= NAMED:
                        self.errors.add("non-finite row", f"{self.shards.place(items[row])} is NaN or infinite")
                self._add(x if finite.all() else x[finite])
                bar.update(len(items))
        if len(bad) > NAMED:
            self.errors.counts["non-finite row"] = len(bad)
            self._count_by_file(bad)
        if self.normalization is not None and self.moments.count:
            with self.errors.collect("statistic"):
                self.normalization.check(self.moments, self.shards.folder)

    def check_vae(self, name: str, autoencoder: Autoencoder) -> str:
        """Compare a VAE with cache.json and the latents, decode one latent, and describe the result."""
        if self.provenance is not None:
            with self.errors.collect("VAE"):
                self.provenance.check_vae(self.shards.folder, name, autoencoder.identity)
        if self.normalization is None or self.example is None:
            return "not tested, because no latent can be decoded"
        try:
            image = LatentCoder(autoencoder, self.normalization).decode(self.example)[0]
        except ValueError as error:
            self.errors.add("VAE", error)
            return "failed"
        if not image.isfinite().all():
            self.errors.add("VAE", f"{name} decodes a latent of {self.shards.folder} into NaN or infinite pixels")
        return f"one latent to {' x '.join(map(str, image.shape))}, from {image.min():.2f} to {image.max():.2f}"

    def _add(self, x: Float[Tensor, "b c h w"]) -> None:
        if not len(x):
            return
        x = x if self.normalization is None else self.normalization.normalize_(x)
        self.example = x[:1].clone() if self.example is None else self.example
        self.moments.add(x)
        self.minimum = torch.minimum(self.minimum, x.amin((0, 2, 3)))
        self.maximum = torch.maximum(self.maximum, x.amax((0, 2, 3)))

    def _count_by_file(self, items: Sequence[int]) -> None:
        places = Counter(self.shards.find(item)[:2] for item in items)
        for (key, shard), count in sorted(places.items(), key=lambda pair: (pair[0][1], pair[0][0])):
            line = f"{self.shards.files[shard]}: {count} rows of {KEYS[key]} are NaN or infinite"
            self.errors.add("non-finite row", line, count=0)
