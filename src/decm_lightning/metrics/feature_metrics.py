"""The metrics of a feature network, computed from one forward pass per image."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from decm_lightning.metrics.features import as_feature_network
from decm_lightning.metrics.metric import Counts, FeatureMetric, Frechet, Prompts
from decm_lightning.metrics.reference import Reference
from decm_lightning.types import Batch

log = logging.getLogger(__name__)
NO_PROMPTS = Prompts()


class FeatureMetrics:
    """All metrics of a feature network, which sees each image once. Values include the images of all processes.

    An unavailable metric, for example one whose weights are missing, is skipped with a warning. This is not an
    nn.Module: in a LightningModule, its network would be saved in every checkpoint.

    Args:
        features: a FeatureNetwork, or any nn.Module with `num_features`.
        seed: seed of KID's subsets and of the splits of the Inception Score.
        reference: the real images or their moments; None if the images will be passed to `update`.
        validation: whether to skip metrics that are too slow for every validation.
        batch_size: images per forward pass of the network, at least 1.

    Attributes:
        unavailable: the reason why a column is not measured, by column.

    Raises:
        ValueError: if the module has no num_features, or the reference has no data for this network or moments of
            another dimension.
    """

    def __init__(
        self,
        features: nn.Module,
        seed: int = 0,
        reference: Reference | None = None,
        validation: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.features = as_feature_network(features)
        self.seed = seed
        self.batch_size = batch_size
        self.unavailable: dict[str, str] = {}
        metrics = [metric for metric in self.features.metrics() if metric.in_validation or not validation]
        metrics = [metric for metric in metrics if self._is_available(metric)]
        reasons = {metric: metric.use_reference(reference) if reference else "" for metric in metrics}
        self.metrics = [metric for metric in metrics if not reasons[metric]]
        unserved = {column: reason for metric, reason in reasons.items() if reason for column in metric.columns}
        if not self.has_distance and unserved:
            column, reason = next(iter(unserved.items()))
            raise ValueError(f"{column} on {self.name} cannot be measured: {reason}")
        self.unavailable |= unserved
        self.is_prepared = False
        self.seen = {real: SumMetric().set_dtype(torch.float64) for real in (True, False)}

    @property
    def name(self) -> str:
        """The name of the feature network."""
        return self.features.name

    @property
    def columns(self) -> list[str]:
        """The names of the values, in order."""
        return [column for metric in self.metrics for column in metric.columns]

    @property
    def needs_real(self) -> bool:
        """Whether a metric needs real images, in addition to the moments of a reference."""
        return any(metric.needs_real for metric in self.metrics)

    @property
    def has_distance(self) -> bool:
        """Whether a Fréchet distance is among the metrics."""
        return any(isinstance(metric, Frechet) for metric in self.metrics)

    @property
    def needs_prompts(self) -> bool:
        """Whether a metric compares generated images with their conditions."""
        return any(metric.needs_prompts for metric in self.metrics)

    def prepare(self, data: Any, read: Callable[[Batch], Batch]) -> None:
        """Fit the network to real training images once, if there are metrics; see `FeatureNetwork.prepare`."""
        if self.metrics and not self.is_prepared:
            self.features.prepare(data, read)
        self.is_prepared = True

    def to(self, device: torch.device) -> "FeatureMetrics":
        """Move the network and the statistics."""
        for module in (self.features, *self.seen.values(), *(metric.metric for metric in self.metrics)):
            module.to(device)
        return self

    @torch.no_grad()
    def update(self, images: Tensor, real: bool, prompts: Prompts = NO_PROMPTS) -> dict[str, Tensor]:
        """Add real or generated images, uint8 (b, c, h, w), with their conditions if they are known.

        Returns:
            the outputs of the network, as `outputs` does; nothing without metrics.

        Raises:
            ValueError: if the images are not uint8, or a metric needs prompts that are not passed.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8: got {images.dtype}, convert them with to_uint8")
        self.seen[real].update(len(images))
        if not self.metrics:
            return {}
        # A single update per batch: every process must make the same number of updates.
        views = self.outputs(images)
        for metric in self.metrics:
            metric.update(views, real, prompts)
        return views

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the network by name, "features" if it returns one tensor, for uint8 images."""
        device = self.seen[True].device
        parts = [_views(self.features(part.to(device))) for part in images.split(self.batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def reset_generated(self) -> None:
        """Discard the generated images but not the real ones."""
        self.seen[False].reset()
        for metric in self.metrics:
            metric.metric.reset()

    def counts(self) -> Counts:
        """Return the numbers of images that were added, over all processes."""
        with self.seen[True].sync_context(), self.seen[False].sync_context():
            return Counts(*(int(cast(Tensor, self.seen[real].sum_value)) for real in (True, False)))

    def describe(self) -> dict[str, str]:
        """Return the settings that the values depend on, by column."""
        counts = self.counts()
        lines = {", ".join(metric.columns): metric.describe(counts) for metric in self.metrics}
        return {columns: line for columns, line in lines.items() if line}

    def compute(self) -> dict[str, float]:
        """Return the value of each column. The state of torch's global generators does not change.

        Raises:
            ValueError: if there are fewer than two real or two generated images.
            NonFiniteError: if a feature was NaN or infinite.
        """
        counts = self.counts()
        if counts.generated < 2 or (self.needs_real and counts.real < 2):
            found = f"{counts.real} real, {counts.generated} generated"
            raise ValueError(f"metrics need at least 2 images of each kind: got {found}")
        return {name: value for metric in self.metrics for name, value in metric.compute(counts, self.seed).items()}

    def _is_available(self, metric: FeatureMetric) -> bool:
        if reason := metric.unavailable_reason():
            self.unavailable |= dict.fromkeys(metric.columns, reason)
            log.warning("%s is not measured: %s", ", ".join(metric.columns), reason)
        return not reason


def metrics_of(
    features: Sequence[nn.Module], seed: int = 0, reference: Reference | None = None, validation: bool = False
) -> list[FeatureMetrics]:
    """Return the metrics of several feature networks, with the arguments of `FeatureMetrics`."""
    qualities = [FeatureMetrics(network, seed, reference, validation) for network in features]
    columns = [column for quality in qualities for column in quality.columns]
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ValueError(f"two feature networks have a column {twice[0]!r}: measure them in two runs")
    return qualities


def _views(features: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"features": features} if isinstance(features, Tensor) else features
