import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from decm_lightning.image_writer import to_uint8
from decm_lightning.metrics import FeatureMetrics
from decm_lightning.metrics.metric import Counts
from tests.metrics.networks import COLUMNS, Small, uint8_images


@pytest.fixture
def few_subsets(monkeypatch):
    """Use ten subsets rather than a hundred, for speed."""
    monkeypatch.setattr("decm_lightning.metrics.metric.KID_SUBSETS", 10)


class Pixels(nn.Module):
    """Pixels as features, with a count of the images."""

    num_features = 4

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1).float()


def images(n: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Pixels with independent normal values."""
    return (mean + std * torch.randn(n, 1, 2, 2, generator=generator)).round().clamp(0, 255).to(torch.uint8)


def quality(real: Tensor, generated: Tensor) -> FeatureMetrics:
    measured = FeatureMetrics(Pixels())
    measured.update(real, real=True)
    measured.update(generated, real=False)
    return measured


def kernel(measured: FeatureMetrics) -> KernelInceptionDistance:
    return measured.metrics[1].kernel


def cubic_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y))) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()


def test_frechet_distance_of_gaussians_is_the_closed_form(generator):
    real, made = images(40_000, 128, 20, generator), images(40_000, 100, 25, generator)
    # Each of the four independent pixels contributes (mu_1 - mu_2)^2 + (sigma_1 - sigma_2)^2.
    assert quality(real, made).compute()["fd"] == pytest.approx(4 * (28**2 + 5**2), rel=0.01)


def test_frechet_distance_of_correlated_features_is_that_of_a_matrix_root(generator):
    mixing = torch.tensor([[1, 0.5, 0.2, 0], [0, 1, 0.7, 0.1], [0, 0, 1, 0.9], [0.3, 0, 0, 1]])
    real = images(500, 120, 15, generator)
    made = (images(700, 60, 10, generator).flatten(1).float() @ mixing).round().to(torch.uint8).reshape(-1, 1, 2, 2)
    x, y = (part.flatten(1).double().numpy() for part in (real, made))
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    root = sqrtm(s_x @ s_y).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x + s_y - 2 * root)
    assert quality(real, made).compute()["fd"] == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_the_unbiased_cubic_mmd(generator):
    real, made = images(300, 3, 1, generator), images(300, 4, 1, generator)
    expected = cubic_mmd(*(part.flatten(1).double().numpy() for part in (real, made)))
    assert quality(real, made).compute()["kid"] == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_near_zero_for_equal_laws_and_grows_with_a_shift(generator, few_subsets):
    real = images(1500, 5, 1, generator)
    kids = [quality(real, images(1200, mean, 1, generator)).compute()["kid"] for mean in (5, 6, 8)]
    assert abs(kids[0]) < 0.02 * kids[1]
    assert 0 < kids[1] < kids[2]


def test_subsets_are_as_large_as_the_smaller_set(generator):
    measured = quality(images(1500, 5, 1, generator), images(40, 5, 1, generator))
    measured.compute()
    assert kernel(measured).subset_size == 40
    assert measured.counts() == Counts(1500, 40)


def test_batches_add_up_and_the_network_sees_each_image_once(generator):
    real, made = images(200, 100, 10, generator), images(200, 110, 10, generator)
    whole, parts = quality(real, made), quality(real[:150], made[:70])
    parts.update(real[150:], real=True)
    parts.update(made[70:], real=False)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-9)
    assert parts.features.network.seen == 400


def test_resetting_forgets_generated_images_only(generator):
    real, made = images(200, 100, 10, generator), images(200, 110, 10, generator)
    measured = quality(real, images(50, 0, 1, generator))
    measured.compute()
    measured.reset_generated()
    assert measured.counts() == Counts(200, 0)
    measured.update(made, real=False)
    assert measured.compute() == quality(real, made).compute()


def test_random_subsets_repeat_and_leave_the_global_generator_alone(generator, few_subsets):
    measured = quality(images(1500, 5, 1, generator), images(1200, 6, 1, generator))
    before = torch.get_rng_state()
    first = measured.compute()
    assert torch.equal(torch.get_rng_state(), before)
    kernel(measured)._computed = None
    torch.manual_seed(1)
    assert measured.compute() == first


def test_too_few_images_and_floats_are_refused(generator):
    with pytest.raises(ValueError, match="got 10 real, 1 generated"):
        quality(images(10, 0, 1, generator), images(1, 0, 1, generator)).compute()
    with pytest.raises(ValueError, match=r"uint8: got torch\.float32"):
        FeatureMetrics(Pixels()).update(torch.zeros(2, 1, 2, 2), real=True)


@pytest.mark.parametrize(("count", "warned"), [(4, True), (5, False)])
def test_a_distance_of_no_more_images_than_features_is_announced_once(count, warned, generator, caplog):
    measured = quality(images(10, 0, 1, generator), images(count, 0, 1, generator))
    measured.compute()
    measured.compute()
    expected = "fd of 4 images is biased upward: use more images than its 4 features"
    assert caplog.messages == [expected] * warned


def test_the_score_is_the_mean_over_splits_of_the_exponential_information(generator):
    made = uint8_images(200, 8, generator, channels=1)
    measured = FeatureMetrics(Small())
    measured.update(made[:5], real=True)
    measured.update(made, real=False)
    torch.manual_seed(1)
    found = measured.compute()["inception_score"]

    logits = Small()(made)["logits"].numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).numpy()
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(p[order], 10)]
    assert found == pytest.approx(np.mean(scores), rel=1e-9)
    assert 1.1 < found < 4


def test_all_metrics_are_of_one_pass_and_in_chunks_the_same(generator):
    real, made = (uint8_images(90, 8, generator, channels=1) // part for part in (1, 2))
    seen = []
    network = Small()
    network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    measured = FeatureMetrics(network, batch_size=64)
    measured.update(real, real=True)
    measured.update(made, real=False)
    assert seen == [64, 26, 64, 26]
    values = measured.compute()
    assert list(values) == measured.columns == COLUMNS

    whole = FeatureMetrics(Small(), batch_size=90)
    whole.update(real, real=True)
    whole.update(made, real=False)
    assert values == pytest.approx(whole.compute(), rel=1e-9)
    views = FeatureMetrics(Views(Small(), "spatial", 5))
    views.update(real, real=True)
    views.update(made, real=False)
    assert values["sfid"] == pytest.approx(views.compute()["fd"], rel=1e-9)


class Views(nn.Module):
    """One view of a network as a network."""

    def __init__(self, network: nn.Module, view: str, size: int):
        super().__init__()
        self.network, self.view, self.num_features = network, view, size

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[self.view]


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([[-2.0, -1.0, 0.999 / 127.5 - 1, 0.0, 254.6 / 127.5 - 1, 1.0, 1.5]])
    assert to_uint8(x).tolist() == [[0, 0, 1, 128, 255, 255, 255]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_survive_the_way_to_floats_and_back(dtype):
    pixels = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(to_uint8(pixels.to(dtype) / 127.5 - 1), pixels)
