import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from decm_lightning.metrics.precision_recall import ImprovedPrecisionRecall


def points(rows: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64) + shift


def measured(real: Tensor, generated: Tensor, **options) -> list[float]:
    metric = ImprovedPrecisionRecall(**options)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return [value.item() for value in metric.compute()]


def inside(queries: Tensor, manifold: Tensor, neighbors: int) -> float:
    """The fraction of queries inside a ball of the manifold, computed with scikit-learn's neighbor search."""
    search = NearestNeighbors(n_neighbors=neighbors).fit(manifold.numpy())
    radii = search.kneighbors(return_distance=True)[0][:, -1]
    distances, numbers = search.kneighbors(queries.numpy(), n_neighbors=len(manifold))
    return float((distances <= radii[numbers]).any(1).mean())


@pytest.mark.parametrize("neighbors", [1, 3, 7])
def test_both_agree_with_a_search_of_neighbors(generator, neighbors):
    real, generated = points(230, generator), points(170, generator, shift=1.0)
    expected = [inside(generated, real, neighbors), inside(real, generated, neighbors)]
    assert min(expected) > 0.05
    assert max(expected) < 0.95
    assert measured(real, generated, neighbors=neighbors) == pytest.approx(expected, abs=1e-12)


def test_chunks_and_batches_change_nothing(generator):
    real, generated = points(101, generator), points(77, generator, shift=0.5)
    whole = measured(real, generated)
    assert measured(real, generated, rows=7) == whole
    metric = ImprovedPrecisionRecall()
    for part in real.split(30):
        metric.update(part, real=True)
    for part in generated.split(50):
        metric.update(part, real=False)
    assert [value.item() for value in metric.compute()] == whole


def test_a_collapsed_sampler_is_precise_and_a_wide_one_recalls(generator):
    real = points(500, generator)
    assert measured(real, 0.1 * points(500, generator))[0] > 0.99
    assert measured(real, 0.1 * points(500, generator))[1] < 0.1
    wide = measured(real, 4 * points(500, generator))
    assert wide[0] < 0.4
    assert wide[1] > 0.95


def test_resetting_keeps_the_real_points(generator):
    real, generated = points(100, generator), points(100, generator, shift=0.5)
    metric = ImprovedPrecisionRecall()
    metric.update(real, real=True)
    metric.update(points(100, generator), real=False)
    metric.compute()
    metric.reset()
    metric.update(generated, real=False)
    assert [value.item() for value in metric.compute()] == measured(real, generated)


def test_too_few_points_and_numbers_below_one_are_refused(generator):
    with pytest.raises(ValueError, match="got 3 real and 10 generated"):
        measured(points(3, generator), points(10, generator))
    with pytest.raises(ValueError, match=r"neighbors.*got 0"):
        ImprovedPrecisionRecall(neighbors=0)
    with pytest.raises(ValueError, match=r"rows.*got 0"):
        ImprovedPrecisionRecall(rows=0)
