"""The metrics of a feature network, each a small part around one torchmetrics.Metric that is fed with features."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from decm_lightning.metrics.frechet import FrechetDistance, PassedOn
from decm_lightning.metrics.precision_recall import PrecisionRecall
from decm_lightning.metrics.reference import Reference
from decm_lightning.types import Condition

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SPLITS = 10


@dataclass(frozen=True)
class Counts:
    """How many images were seen, over all processes."""

    real: int
    generated: int


class Prompts(NamedTuple):
    """What images show, or were drawn for.

    Attributes:
        condition: as the network reads it, b rows.
        texts: b captions in words; None where there are none.
    """

    condition: Condition = None
    texts: list[str] | None = None


class Part(ABC):
    """One metric, of one view of a feature network.

    Args:
        columns: names of its values.
        view: the features it reads, a key of what the network returns; "features" where that is one tensor.
        metric: gathers them, and sums over processes.
    """

    cheap = False
    """Whether it is worth its time in every validation."""
    wants_prompts = False
    """Whether it compares images with what they were drawn for."""

    def __init__(self, columns: tuple[str, ...], view: str, metric: Metric) -> None:
        self.columns = columns
        self.view = view
        self.metric = metric

    @property
    def needs_images(self) -> bool:
        """Whether it waits for real images."""
        return True

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Take in a batch of features, with the prompts of their images if it wants them."""
        self.metric.update(views[self.view], real=real)

    def missing(self) -> str:
        """Get ready; return why it cannot be measured here, "" if it can."""
        return ""

    def refer(self, reference: Reference) -> str:
        """Take what a reference knows already; return why it cannot serve this metric, "" if it can."""
        return "" if reference.images else f"{reference.path} has no images"

    def note(self, counts: Counts) -> str:
        """Return what its values depend on, "" if nothing."""
        return ""

    @abstractmethod
    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return a value for each column."""


class Frechet(Part):
    """The Fréchet distance of a view: an FID if the network is that of the FID, and the view its last pooled layer.

    Args:
        column: its name.
        view: the features.
        num_features: how many.
        moments: name of a reference's moments that belong to this view; "" if there are none.
        cheap: whether its matrix root is worth its time in every validation.
    """

    def __init__(self, column: str, view: str, num_features: int, moments: str = "", cheap: bool = True) -> None:
        self.distance = FrechetDistance(num_features)
        super().__init__((column,), view, self.distance)
        self.num_features = num_features
        self.moments = moments
        self.cheap = cheap

    @property
    def needs_images(self) -> bool:
        """Whether the real moments are not given."""
        return self.distance.given is None

    def refer(self, reference: Reference) -> str:
        """Take the moments of the reference, or wait for its images.

        Raises:
            ValueError: if the moments are of another dimension.
        """
        known = reference.moments.get(self.moments)
        if known is None:
            reason = super().refer(reference)
            return f"{reason}, and its moments are of other features" if reason and reference.moments else reason
        if len(known.mean) != self.num_features:
            wanted = f"{self.columns[0]} needs {self.num_features}, of the same feature network"
            raise ValueError(f"{reference.path}: its mean has {len(known.mean)} features: {wanted}")
        self.distance.given = known
        return ""

    def note(self, counts: Counts) -> str:
        """Say where the real statistics come from."""
        return "" if self.distance.given is None else "real mean and covariance from the reference file"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the distance, 0 for equal moments."""
        return {self.columns[0]: self.distance.compute().item()}


class Kernel(Part):
    """The kernel distance (KID), the unbiased MMD^2 with k(x, y) = (x . y / d + 1)^3 (arXiv 1801.01401), in float64.

    The mean over 100 subsets of min(1000, n) images, n the fewer of real and generated; not multiplied by 1,000.
    """

    cheap = True

    def __init__(self, column: str, view: str, num_features: int) -> None:
        with _unwarned():
            self.kernel = KernelInceptionDistance(PassedOn(num_features), KID_SUBSETS, reset_real_features=False)
        super().__init__((column,), view, self.kernel)

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Take in a batch of features."""
        self.kernel.update(views[self.view].double(), real=real)

    def note(self, counts: Counts) -> str:
        """Say how many subsets of how many images."""
        return f"mean over {_subsets(counts)} subsets of {_subset_size(counts)}, not times 1,000"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the distance, 0 in the mean for equal laws; it may be negative."""
        self.kernel.subset_size = _subset_size(counts)
        self.kernel.subsets = _subsets(counts)
        with _seeded(seed):
            mean, _ = self.kernel.compute()
        return {self.columns[0]: mean.item()}


class Score(Part):
    """The Inception Score exp(E KL(p(y|x) | p(y))) (arXiv 1606.03498), the mean over ten splits; no real images."""

    def __init__(self, column: str, view: str, num_features: int) -> None:
        with _unwarned():
            metric = InceptionScore(PassedOn(num_features), splits=SPLITS)
        super().__init__((column,), view, metric)

    @property
    def needs_images(self) -> bool:
        """It needs none."""
        return False

    def update(self, views: Mapping[str, Tensor], real: bool, prompts: Prompts) -> None:
        """Take in a batch of logits, if generated."""
        if not real:
            self.metric.update(views[self.view])

    def refer(self, reference: Reference) -> str:
        """Need nothing."""
        return ""

    def note(self, counts: Counts) -> str:
        """Say how many splits."""
        return f"mean over {SPLITS} splits, in random order"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return the score, 1 at least and the number of classes at most."""
        with _seeded(seed):
            mean, _ = self.metric.compute()
        return {self.columns[0]: mean.item()}


class Manifolds(Part):
    """Improved precision and recall with k = 3 (arXiv 1904.06991)."""

    def __init__(self, view: str) -> None:
        super().__init__(("precision", "recall"), view, PrecisionRecall())

    def note(self, counts: Counts) -> str:
        """Say which k, and of how many images: both values depend on it."""
        return f"k = 3, {counts.generated} generated against {counts.real} real images"

    def compute(self, counts: Counts, seed: int) -> dict[str, float]:
        """Return both, in [0, 1]."""
        return dict(zip(self.columns, (value.item() for value in self.metric.compute()), strict=True))


def _subsets(counts: Counts) -> int:
    # Subsets that hold all images are all the same.
    return KID_SUBSETS if max(counts.real, counts.generated) > _subset_size(counts) else 1


def _subset_size(counts: Counts) -> int:
    return min(KID_SUBSET_SIZE, counts.real, counts.generated)


@contextmanager
def _unwarned() -> Iterator[None]:
    # torchmetrics warns that it keeps all features, which is how these two work.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the accelerators, whose state is not forked here.
        torch.default_generator.manual_seed(seed)
        yield
