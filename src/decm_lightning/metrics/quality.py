"""How far generated images are from real ones, by all the metrics of one feature network."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from decm_lightning.metrics.parts import Counts, Frechet, Kernel, Part
from decm_lightning.metrics.reference import Reference


class Quality:
    """The metrics of a feature network, which sees each image once; among several processes they are of all images.

    A network without a method `parts()` gives `fd`, the Fréchet distance of its features, and `kid`, the kernel
    distance (metrics.parts); InceptionFeatures and DINOv2Features say themselves what is measured on them. It is no
    nn.Module: inside a LightningModule its network would land in every checkpoint.

    Args:
        features: frozen; uint8 images (b, c, h, w) to features (b, num_features), or to several of them by name.
        seed: seed of what a metric draws: KID's subsets, the splits of the Inception Score.
        reference: the real images, or what is known of them; None if they will be given to `real`.
        cheap: leave out what takes too long for every validation.
        batch_size: images that the network sees at once, at least 1.

    Raises:
        ValueError: if the reference has nothing for this network, or moments of another dimension.
    """

    def __init__(
        self,
        features: nn.Module,
        seed: int = 0,
        reference: Reference | None = None,
        cheap: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.features = features
        self.seed = seed
        self.batch_size = batch_size
        parts = [part for part in _parts(features) if part.cheap or not cheap]
        reasons = {part: part.refer(reference) if reference else "" for part in parts}
        self.parts = [part for part in parts if not reasons[part]]
        self.left_out = {column: why for part, why in reasons.items() if why for column in part.columns}
        if not any(isinstance(part, Frechet) for part in self.parts) and self.left_out:
            column, reason = next(iter(self.left_out.items()))
            raise ValueError(f"no {column} on {self.name}: {reason}")
        self.seen = {real: SumMetric().set_dtype(torch.float64) for real in (True, False)}

    @property
    def name(self) -> str:
        """The name of the feature network."""
        return str(getattr(self.features, "name", type(self.features).__name__))

    @property
    def columns(self) -> list[str]:
        """The names of what is measured, in order."""
        return [column for part in self.parts for column in part.columns]

    @property
    def needs_images(self) -> bool:
        """Whether a metric needs real images, beyond moments that are given."""
        return any(part.needs_images for part in self.parts)

    def to(self, device: torch.device) -> "Quality":
        """Move the network and the statistics."""
        for module in (self.features, *self.seen.values(), *(part.metric for part in self.parts)):
            module.to(device)
        return self

    def real(self, images: Tensor) -> None:
        """Take in real images, uint8 (b, c, h, w).

        Raises:
            ValueError: if the images are not uint8.
        """
        self._update(images, real=True)

    def generated(self, images: Tensor) -> None:
        """Take in generated images, uint8 (b, c, h, w).

        Raises:
            ValueError: if the images are not uint8.
        """
        self._update(images, real=False)

    def reset_generated(self) -> None:
        """Forget the generated images and keep the real ones."""
        self.seen[False].reset()
        for part in self.parts:
            part.metric.reset()

    def counts(self) -> Counts:
        """Return the numbers of images that were seen, over all processes."""
        with self.seen[True].sync_context(), self.seen[False].sync_context():
            return Counts(*(int(cast(Tensor, self.seen[real].sum_value)) for real in (True, False)))

    def notes(self) -> dict[str, str]:
        """Return what the values depend on, by column."""
        counts = self.counts()
        notes = {", ".join(part.columns): part.note(counts) for part in self.parts}
        return {columns: note for columns, note in notes.items() if note}

    def compute(self) -> dict[str, float]:
        """Return the value of each column; the state of torch's global generators is left as it was.

        Raises:
            ValueError: if there are fewer than two real or two generated images.
            NonFiniteError: if a feature was NaN or infinite.
        """
        counts = self.counts()
        if counts.generated < 2 or (self.needs_images and counts.real < 2):
            found = f"{counts.real} real, {counts.generated} made"
            raise ValueError(f"a distance needs at least 2 images of each kind: got {found}")
        return {name: value for part in self.parts for name, value in part.compute(counts, self.seed).items()}

    @torch.no_grad()
    def _update(self, images: Tensor, real: bool) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, see to_uint8: got {images.dtype}")
        device = self.seen[real].device
        views = [_views(self.features(part.to(device))) for part in images.split(self.batch_size)]
        # One update for all of them: processes must make equally many.
        whole = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        for part in self.parts:
            part.update(whole, real)
        self.seen[real].update(len(images))


def _parts(features: Any) -> list[Part]:
    if hasattr(features, "parts"):
        return list(features.parts())
    size = cast(int, features.num_features)
    return [Frechet("fd", "features", size), Kernel("kid", "features", size)]


def _views(features: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"features": features} if isinstance(features, Tensor) else features
