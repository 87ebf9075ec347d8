"""A whole folder of latents read for `decm validate-data`: statistics by channel, and everything that is wrong."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from decm_lightning.autoencoders import Autoencoder
from decm_lightning.data.latents.latent_coder import LatentCoder
from decm_lightning.data.latents.normalization import LatentNormalization, Moments, finite_rows
from decm_lightning.data.latents.provenance import Provenance
from decm_lightning.data.latents.shards import KEYS, Shards

NAMED = 10
"""At most this number of non-finite rows are named; all are counted."""


class ErrorReport:
    """Everything that is wrong with a folder: reported at once in one line each, and counted by kind.

    Args:
        report: receives each line.
    """

    def __init__(self, report: Callable[[str], object]) -> None:
        self.report = report
        self.counts: Counter[str] = Counter()
        self.first = ""

    def add(self, kind: str, what: Exception | str, count: int = 1) -> None:
        """Report an error; its kind is a noun in the singular, its count 0 for errors that are already counted."""
        named = isinstance(what, OSError) and what.filename is not None
        line = f"{what.filename}: {what.strerror}" if named else str(what)  # type: ignore[union-attr]
        self.report(line)
        self.first = self.first or line
        self.counts[kind] += count

    @contextmanager
    def collect(self, kind: str) -> Iterator[None]:
        """Report the ValueError or OSError that ends the block."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.add(kind, error)

    def check(self, folder: str) -> None:
        """Raise ValueError with the number of errors by kind and the first of them, if there is one."""
        if total := self.counts.total():
            kinds = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in self.counts.items() if count)
            raise ValueError(f"{total} error{'s' * (total > 1)} in {folder} ({kinds}), the first: {self.first}")


class FolderCheck:
    """A folder of latents, opened as far as its errors allow, with statistics of its rows.

    `shards` lacks the files that cannot be used; `provenance` and `normalization` are None if they are missing or
    cannot be used. `read` fills the rest: `moments`, `minimum` and `maximum` of each channel (c,) of the latents,
    normalized if they can be, over finite rows, of which `example` is the first (1, c, h, w).

    Args:
        folder: the folder.
        num_classes: labels must be below it; None for what cache.json says.
        latent_norm: as for `Latents`.
        latent_multiplier: as for `Latents`.
        errors: receives everything that is wrong.

    Raises:
        FileNotFoundError: if there is no such folder, or no shard in it.
        ValueError: if no shard can be used.
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
        """Compare the files that cache.json names with their checksums."""
        if self.provenance is None:
            return
        files = [self.shards.folder / name for name in sorted(self.provenance.checksums)]
        for file in tqdm([file for file in files if file.is_file()], "checksums", unit="file"):
            with self.errors.collect("checksum"):
                self.provenance.check_file(file)

    def read(self) -> None:
        """Read every latent, plain and mirrored; rows that are not finite are errors, and left out of the moments."""
        bad: list[int] = []
        with tqdm(total=2 * len(self.shards), desc="latents", unit="latent") as bar:
            for items in self.shards.blocks():
                x = self.shards.read(items)
                finite = finite_rows(x)
                for row in finite.logical_not().nonzero().flatten().tolist():
                    bad.append(items[row])
                    if len(bad) <= NAMED:
                        self.errors.add("non-finite row", f"{self.shards.place(items[row])} is NaN or infinite")
                self._take_in(x if finite.all() else x[finite])
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
            return "not tried: there is no latent to decode"
        try:
            image = LatentCoder(autoencoder, self.normalization).decode(self.example)[0]
        except ValueError as error:
            self.errors.add("VAE", error)
            return "not possible"
        if not image.isfinite().all():
            self.errors.add("VAE", f"{name} decodes a latent of {self.shards.folder} to NaN or infinity")
        return f"one to {' x '.join(map(str, image.shape))}, from {image.min():.2f} to {image.max():.2f}"

    def _take_in(self, x: Float[Tensor, "b c h w"]) -> None:
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
