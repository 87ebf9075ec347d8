"""The distances that a perfect model would have with as many images: those between two samples of one distribution."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics.aggregation import SumMetric

from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.metric import Counts, FeatureMetric, Prompts


class Floor:
    """The distances between two sets of images, by the metrics of validation that compare real with generated images.

    For two independent sets of n images from one distribution, fd falls like 1 / n and kid scatters around 0.
    """

    def __init__(self, qualities: Sequence[FeatureMetrics]) -> None:
        # New metrics of the same networks. Their features come from the passes that the table needs anyway.
        self.metrics = {quality: _distances(quality) for quality in qualities}
        self.seen = {is_first: SumMetric().set_dtype(torch.float64) for is_first in (True, False)}
        for metric in self.seen.values():
            metric.update(0)

    def update(self, views: Mapping[FeatureMetrics, Mapping[str, Tensor]], is_first: bool) -> None:
        """Add images to the first or the second set, by the outputs of each network."""
        self.seen[is_first].update(len(next(iter(next(iter(views.values())).values()))))
        for quality, metrics in self.metrics.items():
            for metric in metrics:
                metric.update(views[quality], is_first, Prompts())

    def split(self, views: Mapping[FeatureMetrics, Mapping[str, Tensor]]) -> None:
        """Add every other image to the first set, and the others to the second."""
        for is_first in (True, False):
            start = int(not is_first)
            half = {q: {name: view[start::2] for name, view in each.items()} for q, each in views.items()}
            self.update(half, is_first)

    def compute(self, between: str) -> dict[str, Any]:
        """Return a row with what was compared, the number of images in each set, and the distances."""
        first, second = (int(cast(Tensor, self.seen[is_first].compute())) for is_first in (True, False))
        if min(first, second) < 2:
            return {}
        values = {
            name: value
            for quality, metrics in self.metrics.items()
            for metric in metrics
            for name, value in metric.compute(Counts(first, second), quality.seed).items()
        }
        return {"between": between, "images": min(first, second), **values} if values else {}

    def to(self, device: torch.device) -> "Floor":
        """Move the statistics."""
        for module in (*self.seen.values(), *(m.metric for metrics in self.metrics.values() for m in metrics)):
            module.to(device)
        return self


def _distances(quality: FeatureMetrics) -> list[FeatureMetric]:
    metrics = [m for m in quality.features.metrics() if set(m.columns) <= set(quality.columns)]
    return [m for m in metrics if m.in_validation and m.needs_real and not m.needs_prompts]
