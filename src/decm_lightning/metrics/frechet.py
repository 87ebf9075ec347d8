"""The Fréchet distance of two sets of features, with a matrix root that is exact even for singular covariances."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from decm_lightning.errors import NonFiniteError

ROUNDING = 1e-5
"""How far below 0 rounding may move eigenvalues, relative to the largest. Covariances may be saved in float32."""
CANCELLED = 1e-10
"""The same, relative to the squared mean, which is subtracted from the mean square."""


class IdentityFeatures(nn.Identity):
    """An identity as the feature network of a torchmetrics.Metric, so that the metric can be updated with features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and covariance (d, d) of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of_sums(cls, total: Tensor, products: Tensor, count: Tensor) -> "Moments":
        """Return the moments from the sum of x (d,), the sum of x x^T (d, d) and the number of x, at least 2."""
        mean = total / count
        return cls(mean, (products - count * torch.outer(mean, mean)) / (count - 1))


class FrechetDistance(FrechetInceptionDistance):
    """|mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2)) (arXiv 1706.08500) of d = num_features features, in float64.

    torchmetrics accumulates the moments over all processes. It computes the root from the eigenvalues of S_r S_g, which
    become complex if a covariance is singular. Here, with S_r = L L^T, the trace of (S_r S_g)^(1/2) is the sum of the
    square roots of the eigenvalues of the symmetric matrix L^T S_g L. L is reused for the next generated images.
    Precomputed moments of the real images can be `given`; they are used instead of their features.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(IdentityFeatures(num_features), reset_real_features=False)
        self.given: Moments | None = None
        self.factor: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        # The factor is derived from the real features, so it is not a state of torchmetrics.
        self.factor = None if self.factor is None else fn(self.factor)
        return super()._apply(fn, *args)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add features (b, d). Real features are ignored if their moments are `given`."""
        if real and self.given is not None:
            return
        if real:
            self.factor = None
        super().update(imgs, real)

    def compute(self) -> Tensor:
        """Return the distance.

        Raises:
            NonFiniteError: if a feature was NaN or infinite.
            ValueError: if the covariance of the `given` moments has eigenvalues below 0.
        """
        generated = Moments.of_sums(self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples)
        if self.given is None:
            real = Moments.of_sums(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        else:
            real = Moments(*(part.to(generated.mean.device) for part in (self.given.mean, self.given.covariance)))
        if self.factor is None:
            self.factor = _factor(real)
        seen = self.factor.T @ _finite(generated.covariance, "generated features") @ self.factor
        floor = CANCELLED * (generated.mean.square().sum() * real.covariance.trace()).item()
        root = _not_negative(torch.linalg.eigvalsh(seen), "generated features", floor).sqrt().sum()
        traces = real.covariance.trace() + generated.covariance.trace()
        # Rounding may make the distance of equal sets negative.
        return ((real.mean - generated.mean).square().sum() + traces - 2 * root).clamp(min=0)


def _factor(real: Moments) -> Tensor:
    values, vectors = torch.linalg.eigh(_finite(real.covariance, "real features"))
    floor = CANCELLED * real.mean.square().sum().item()
    return vectors * _not_negative(values, "real features", floor).sqrt()


def _finite(matrix: Tensor, name: str) -> Tensor:
    if not matrix.isfinite().all():
        raise NonFiniteError(f"the covariance of the {name} is not finite: a feature is NaN or infinite")
    return matrix


def _not_negative(values: Tensor, name: str, floor: float) -> Tensor:
    least, greatest = values[0].item(), values[-1].item()
    if least < -max(ROUNDING * greatest, floor):
        found = f"got eigenvalues from {least:g} to {greatest:g}"
        raise ValueError(f"the covariance of the {name} must be positive semidefinite: {found}")
    return values.clamp(min=0)
