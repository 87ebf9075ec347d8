"""The Fréchet distance of two sets of features, with a matrix root that cannot go wrong unseen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from decm_lightning.errors import NonFiniteError

# Eigenvalues of a covariance may be below 0 by rounding, by so much of the largest one where it was kept in float32.
ROUNDING = 1e-5
# And by so much of the mean's square, which is taken away from the mean square: all of it where all images are alike.
CANCELLED = 1e-10


class PassedOn(nn.Identity):
    """Stands where torchmetrics expects the feature network: what comes in are features already."""

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
        """Return the moments by the sum of x (d,), the sum of x x^T (d, d) and the number of x, at least 2."""
        mean = total / count
        return cls(mean, (products - count * torch.outer(mean, mean)) / (count - 1))

    def to(self, device: torch.device) -> "Moments":
        """Return them on a device."""
        return Moments(self.mean.to(device), self.covariance.to(device))


class FrechetDistance(FrechetInceptionDistance):
    """|mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2)) (arXiv 1706.08500), in float64.

    torchmetrics gathers the moments, over all processes. The root is ours: with S_r = L L^T, the trace of
    (S_r S_g)^(1/2) is the sum of the roots of the eigenvalues of L^T S_g L. That matrix is symmetric: its eigenvalues
    are real, at least 0, and quick to find, where those of S_r S_g come out complex when a covariance has not full
    rank. L is kept from one generated set to the next.

    Args:
        num_features: d.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(PassedOn(num_features), reset_real_features=False)
        self.given: Moments | None = None
        self.factor: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        # No state of torchmetrics: the factor follows from the real features.
        self.factor = None if self.factor is None else fn(self.factor)
        return super()._apply(fn, *args)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Take in features (b, d); real ones are left out where their moments are given."""
        if real and self.given is not None:
            return
        if real:
            self.factor = None
        super().update(imgs, real)

    def compute(self) -> Tensor:
        """Return the distance.

        Raises:
            NonFiniteError: if a feature was NaN or infinite.
            ValueError: if given moments have a covariance with eigenvalues below 0.
        """
        generated = Moments.of_sums(self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples)
        if self.given is None:
            real = Moments.of_sums(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        else:
            real = self.given.to(generated.mean.device)
        if self.factor is None:
            self.factor = _factor(real)
        seen = self.factor.T @ _finite(generated.covariance, "generated features") @ self.factor
        floor = CANCELLED * (generated.mean.square().sum() * real.covariance.trace()).item()
        root = _not_negative(torch.linalg.eigvalsh(seen), "generated features", floor).sqrt().sum()
        traces = real.covariance.trace() + generated.covariance.trace()
        return (real.mean - generated.mean).square().sum() + traces - 2 * root


def _factor(real: Moments) -> Tensor:
    values, vectors = torch.linalg.eigh(_finite(real.covariance, "real features"))
    floor = CANCELLED * real.mean.square().sum().item()
    return vectors * _not_negative(values, "real features", floor).sqrt()


def _finite(matrix: Tensor, what: str) -> Tensor:
    if not matrix.isfinite().all():
        raise NonFiniteError(f"the covariance of the {what} is not finite: the feature network gave NaN or infinity")
    return matrix


def _not_negative(values: Tensor, what: str, floor: float) -> Tensor:
    least, greatest = values[0].item(), values[-1].item()
    if least < -max(ROUNDING * greatest, floor):
        raise ValueError(f"the {what} have no covariance matrix: its eigenvalues go from {least:g} to {greatest:g}")
    return values.clamp(min=0)
