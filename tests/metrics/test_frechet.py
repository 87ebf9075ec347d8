import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from decm_lightning.errors import NonFiniteError
from decm_lightning.metrics.frechet import FrechetDistance, Moments


def features(rows: int, size: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    """Correlated features whose scales differ by a factor of a million, as in Inception."""
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    widths = torch.logspace(-3, 3, size, dtype=torch.float64)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64) * widths @ mixing + shift


def measured(real: Tensor, generated: Tensor) -> FrechetDistance:
    distance = FrechetDistance(real.shape[1])
    distance.update(real, real=True)
    distance.update(generated, real=False)
    return distance


def by_singular_values(real: Tensor, generated: Tensor) -> float:
    """The distance without a matrix root: the singular values of X_r X_g^T sum to the trace of the root."""
    x, y = ((part - part.mean(0)).numpy() / (len(part) - 1) ** 0.5 for part in (real, generated))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((real.mean(0) - generated.mean(0)) ** 2).sum().item() + (x**2).sum() + (y**2).sum() - 2 * root


def test_full_rank_agrees_with_scipys_root(generator):
    real, generated = features(300, 20, generator), features(400, 20, generator, shift=3)
    s_r, s_g = np.cov(real.numpy().T), np.cov(generated.numpy().T)
    root = sqrtm(s_r @ s_g)
    expected = ((real.mean(0) - generated.mean(0)) ** 2).sum().item() + np.trace(s_r + s_g - 2 * root.real)
    assert measured(real, generated).compute().item() == pytest.approx(expected, rel=1e-6)
    assert by_singular_values(real, generated) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("real_rows", "generated_rows"), [(30, 40), (30, 200), (200, 30), (3, 2)])
def test_fewer_samples_than_dimensions_leave_the_distance_right(generator, real_rows, generated_rows):
    real, generated = features(real_rows, 64, generator), features(generated_rows, 64, generator, shift=1)
    expected = by_singular_values(real, generated)
    assert measured(real, generated).compute().item() == pytest.approx(expected, rel=1e-6)


def test_scipys_root_of_a_singular_product_agrees_where_it_is_finite(generator):
    real, generated = (torch.randn(rows, 64, generator=generator, dtype=torch.float64) for rows in (40, 50))
    s_r, s_g = np.cov(real.numpy().T), np.cov(generated.numpy().T)
    root = sqrtm(s_r @ s_g)
    assert np.isfinite(root).all()
    expected = ((real.mean(0) - generated.mean(0)) ** 2).sum().item() + np.trace(s_r + s_g - 2 * root.real)
    # The error of that root for singular matrices is about the root of the machine precision per null direction.
    assert measured(real, generated).compute().item() == pytest.approx(expected, rel=1e-4)


def test_equal_sets_are_at_distance_zero_whatever_their_rank(generator):
    for rows in (2, 20, 50, 100, 300):
        real = torch.randn(rows, 50, generator=generator, dtype=torch.float64)
        assert 0 <= measured(real, real).compute().item() < 1e-5


def test_given_moments_stand_for_the_features_they_are_of(generator):
    real, generated = features(300, 8, generator), features(200, 8, generator, shift=2)
    expected = measured(real, generated).compute().item()
    distance = FrechetDistance(8)
    distance.given = Moments(real.mean(0), torch.cov(real.T))
    distance.update(real + 5, real=True)
    distance.update(generated, real=False)
    assert distance.compute().item() == pytest.approx(expected, rel=1e-6)
    distance.reset()
    distance.update(generated[:100], real=False)
    assert distance.compute().item() == pytest.approx(measured(real, generated[:100]).compute().item(), rel=1e-6)


def test_the_kept_factor_follows_new_real_features(generator):
    real, generated = features(300, 8, generator), features(200, 8, generator)
    distance = measured(real[:100], generated)
    distance.compute()
    distance.update(real[100:], real=True)
    assert distance.compute().item() == pytest.approx(measured(real, generated).compute().item(), rel=1e-6)


@pytest.mark.parametrize("collapsed", [(False, True), (True, False), (True, True)])
def test_images_that_are_all_alike_are_far_and_no_error(collapsed, generator):
    """A collapsed student has such features: the covariance is 0 up to the rounding of the mean."""
    sets = [torch.rand(300, 20, generator=generator, dtype=torch.float64) for _ in collapsed]
    real, generated = (x[:1].expand(len(x), -1) if alike else x for x, alike in zip(sets, collapsed, strict=True))
    spread = sum(x.var(0).sum() for x in (real, generated))
    expected = (real.mean(0) - generated.mean(0)).square().sum() + spread
    assert measured(real, generated).compute().item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_that_are_not_finite_are_refused(generator):
    real, generated = features(30, 4, generator), features(30, 4, generator)
    for bad in ((real, generated.index_fill(0, torch.tensor(3), float("nan"))), (real / 0, generated)):
        with pytest.raises(NonFiniteError, match=r"covariance.*(real|generated)"):
            measured(*bad).compute()


def test_a_matrix_that_is_no_covariance_is_refused(generator):
    distance = FrechetDistance(4)
    distance.given = Moments(torch.zeros(4).double(), torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1])).double())
    distance.update(features(30, 4, generator), real=False)
    with pytest.raises(ValueError, match=r"real features .* from -0.1 to 1"):
        distance.compute()
