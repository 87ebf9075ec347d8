"""How far generated images are from real ones, by all the metrics of one feature network."""

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from decm_lightning.metrics.feature_metrics import Counts, Frechet, Kernel, Part, Prompts
from decm_lightning.metrics.reference import Reference
from decm_lightning.types import Batch

log = logging.getLogger(__name__)
NO_PROMPTS = Prompts()


class Quality:
    """The metrics of a feature network, which sees each image once; among several processes they are of all images.

    A network without a method `parts()` gives `fd`, the Fréchet distance of its features, and `kid`, the kernel
    distance (metrics.parts); InceptionFeatures and DINOv2Features say themselves what is measured on them. A network
    with a method `prepare(data, read)`, such as CaptionProbe, is fitted by `prepare`. What cannot be measured, for
    want of a library or of weights, is left out with a warning. It is no nn.Module: inside a LightningModule its
    network would land in every checkpoint.

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
        self.left_out: dict[str, str] = {}
        parts = [part for part in _parts(features) if (part.cheap or not cheap) and self._is_there(part)]
        reasons = {part: part.refer(reference) if reference else "" for part in parts}
        self.parts = [part for part in parts if not reasons[part]]
        unserved = {column: why for part, why in reasons.items() if why for column in part.columns}
        if not self.has_distance and unserved:
            column, reason = next(iter(unserved.items()))
            raise ValueError(f"no {column} on {self.name}: {reason}")
        self.left_out |= unserved
        self.is_prepared = False
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

    @property
    def has_distance(self) -> bool:
        """Whether a Fréchet distance is among the metrics."""
        return any(isinstance(part, Frechet) for part in self.parts)

    @property
    def wants_prompts(self) -> bool:
        """Whether a metric compares images with what they were drawn for."""
        return any(part.wants_prompts for part in self.parts)

    def prepare(self, data: Any, read: Callable[[Batch], Batch]) -> None:
        """Fit the network to real images of training, once, if it is one that needs it and anything is measured on it.

        Args:
            data: the datamodule.
            read: turns its batches into uint8 images with their conditions.
        """
        prepare: Callable[..., None] | None = getattr(self.features, "prepare", None)
        if self.parts and not self.is_prepared and prepare is not None:
            prepare(data, read)
        self.is_prepared = True

    def to(self, device: torch.device) -> "Quality":
        """Move the network and the statistics."""
        for module in (self.features, *self.seen.values(), *(part.metric for part in self.parts)):
            module.to(device)
        return self

    def real(self, images: Tensor, prompts: Prompts = NO_PROMPTS) -> None:
        """Take in real images, uint8 (b, c, h, w), and what they show if it is known.

        Raises:
            ValueError: if the images are not uint8.
        """
        self._update(images, True, prompts)

    def generated(self, images: Tensor, prompts: Prompts = NO_PROMPTS) -> None:
        """Take in generated images, uint8 (b, c, h, w), and what they were drawn for.

        Raises:
            ValueError: if the images are not uint8, or a metric wants other prompts.
        """
        self._update(images, False, prompts)

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

    def _is_there(self, part: Part) -> bool:
        if reason := part.missing():
            self.left_out |= dict.fromkeys(part.columns, reason)
            log.warning("%s is not measured: %s", ", ".join(part.columns), reason)
        return not reason

    @torch.no_grad()
    def _update(self, images: Tensor, real: bool, prompts: Prompts) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8, see to_uint8: got {images.dtype}")
        self.seen[real].update(len(images))
        if not self.parts:
            return
        device = self.seen[real].device
        views = [_views(self.features(part.to(device))) for part in images.split(self.batch_size)]
        # One update for all of them: processes must make equally many.
        whole = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        for part in self.parts:
            part.update(whole, real, prompts)


def _parts(features: Any) -> list[Part]:
    if hasattr(features, "parts"):
        return list(features.parts())
    size = cast(int, features.num_features)
    return [Frechet("fd", "features", size), Kernel("kid", "features", size)]


def _views(features: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"features": features} if isinstance(features, Tensor) else features
