"""Metrics on the outputs of a feature network. Each updates a torchmetrics.Metric and returns values by column."""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import inception
from torchmetrics.image.kid import KernelInceptionDistance

from decm_lightning.metrics.frechet import FrechetDistance, IdentityFeatures
from decm_lightning.metrics.precision_recall import ImprovedPrecisionRecall
from decm_lightning.metrics.reference import Reference
from decm_lightning.types import Condition

log = logging.getLogger(__name__)

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SPLITS = 10


@dataclass(frozen=True)
class Counts:
    """The numbers of images over all processes."""

    real: int
    generated: int


class Prompts(NamedTuple):
    """The conditions of b images: the network's input, and the captions as text if they are known."""

    condition: Condition = None
    texts: list[str] | None = None


class FeatureMetric(ABC):
    """One metric on one output of a feature network.

    Args:
        columns: names of its values.
        view: the output it reads, a key of the network's dict; "features" for a network that returns one tensor.
        metric: accumulates features and sums over processes. Its reset must not discard the real features.
    """

    in_validation = False
    """Whether it is fast enough for every validation."""
    needs_real = True
    """Whether it needs real images."""
    needs_prompts = False
    """Whether it compares generated images with their conditions."""

    def __init__(self, columns: tuple[str, ...], view: str, metric: Metric) -> None:
        self.columns = columns
        self.view = view
        self.metric = metric

    def unavailable_reason(self) -> str:
        """Load what the metric needs; return why it cannot be measured, "" if it can."""
        return ""

    def use_reference(self, reference: Reference) -> str:
        """Use the statistics of a reference; return why this metric cannot use it, "" if it can."""
        return f"{reference.path} has no images" if self.needs_real and not reference.images else ""

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Add a batch of features."""
        self.metric.update(views[self.view], real=real)

    def describe(self, counts: Counts) -> str:
        """Return the settings that its values depend on, "" for none."""
        return ""

    @abstractmethod
    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return a value for each column."""


class Frechet(FeatureMetric):
    """The Fréchet distance of one output: the FID for the pooled features of Inception.

    `moments` is the name of this output's moments in a reference; "" if a reference never has them. With many features,
    the matrix root is too slow for every validation.
    """

    def __init__(
        self, column: str, view: str, num_features: int, moments: str = "", in_validation: bool = True
    ) -> None:
        self.distance = FrechetDistance(num_features)
        super().__init__((column,), view, self.distance)
        self.num_features = num_features
        self.moments = moments
        self.in_validation = in_validation
        self.warned = False

    def use_reference(self, reference: Reference) -> str:
        """Use the moments of the reference, or its images, which are passed to `update`."""
        moments = reference.moments.get(self.moments)
        if moments is None:
            reason = super().use_reference(reference)
            return f"{reason}, and its moments are of other features" if reason and reference.moments else reason
        if len(moments.mean) != self.num_features:
            expected = f"{self.columns[0]} needs {self.num_features}, of the same feature network"
            raise ValueError(f"{reference.path}: its mean has {len(moments.mean)} features: {expected}")
        self.distance.given = moments
        self.needs_real = False
        return ""

    def describe(self, counts: Counts) -> str:
        """Return where the real statistics come from."""
        return "" if self.needs_real else "real mean and covariance from the reference file"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the distance, 0 for equal moments. Too few images for a covariance of full rank are a warning."""
        few = min(counts.generated, counts.real) if self.needs_real else counts.generated
        if few <= self.num_features and not self.warned:
            self.warned = True
            fault = f"{self.columns[0]} of {few} images is biased upward"
            rank_zero_only(log.warning)("%s: use more images than its %d features", fault, self.num_features)
        return {self.columns[0]: self.distance.compute().item()}


class KID(FeatureMetric):
    """The kernel distance (KID), the unbiased MMD^2 with k(x, y) = (x . y / d + 1)^3 (arXiv 1801.01401), in float64.

    It is the mean over 100 subsets of min(1000, n) images, where n is the smaller number of images, and not multiplied
    by 1,000.
    """

    in_validation = True

    def __init__(self, column: str, view: str, num_features: int) -> None:
        with _without_memory_warning():
            self.kernel = KernelInceptionDistance(
                IdentityFeatures(num_features), KID_SUBSETS, reset_real_features=False
            )
        super().__init__((column,), view, self.kernel)

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Add a batch of features."""
        self.kernel.update(views[self.view].double(), real=real)

    def describe(self, counts: Counts) -> str:
        """Return the number and size of the subsets."""
        subsets, size = _subsets(counts)
        return f"mean over {subsets} subsets of {size}, not times 1,000"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the distance. Its expectation is 0 for equal distributions; it may be negative."""
        self.kernel.subsets, self.kernel.subset_size = _subsets(counts)
        with _seeded(seed):
            mean, _ = self.kernel.compute()
        return {self.columns[0]: mean.item()}


class InceptionScore(FeatureMetric):
    """The Inception Score exp(E KL(p(y|x) | p(y))) (arXiv 1606.03498), the mean over ten splits of generated images."""

    needs_real = False

    def __init__(self, column: str, view: str, num_features: int) -> None:
        with _without_memory_warning():
            metric = inception.InceptionScore(IdentityFeatures(num_features), splits=SPLITS)
        super().__init__((column,), view, metric)

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Add a batch of logits of generated images."""
        if not real:
            self.metric.update(views[self.view])

    def describe(self, counts: Counts) -> str:
        """Return the number of splits."""
        return f"mean over {SPLITS} splits, in random order"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the score, between 1 and the number of classes."""
        with _seeded(seed):
            mean, _ = self.metric.compute()
        return {self.columns[0]: mean.item()}


class PrecisionRecall(FeatureMetric):
    """Improved precision and recall with k = 3 (arXiv 1904.06991)."""

    def __init__(self, view: str) -> None:
        super().__init__(("precision", "recall"), view, ImprovedPrecisionRecall())

    def describe(self, counts: Counts) -> str:
        """Return k and the numbers of images, on which both values depend."""
        return f"k = 3, {counts.generated} generated against {counts.real} real images"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return precision and recall, in [0, 1]."""
        return dict(zip(self.columns, (value.item() for value in self.metric.compute()), strict=True))


def _subsets(counts: Counts) -> tuple[int, int]:
    size = min(KID_SUBSET_SIZE, counts.real, counts.generated)
    # Subsets that contain all images are identical.
    return KID_SUBSETS if max(counts.real, counts.generated) > size else 1, size


@contextmanager
def _without_memory_warning() -> Iterator[None]:
    # torchmetrics warns that these two store all features.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the accelerators, whose state is not forked here.
        torch.default_generator.manual_seed(seed)
        yield
