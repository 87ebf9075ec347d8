import sys

import numpy as np
import pytest
import torch
from PIL import Image

from decm_lightning.metrics import DINOv2Features, FeatureMetrics
from tests.metrics.networks import uint8_images

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny DINOv2 with random weights, saved like the real ones."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56
    )
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("side", [64, 300])
def test_features_are_the_class_token_of_pictures_that_pil_resized(folder, side, generator):
    images = uint8_images(2, side, generator)
    network = DINOv2Features(folder)
    resized = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for image in images
    ]
    pixels = np.stack([np.asarray(image) / 255 for image in resized])
    pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    plain = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = plain(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).pooler_output
    # PIL rounds after each of the two axes, so a few pixels differ by one level.
    torch.testing.assert_close(network(images), expected, atol=0.02, rtol=0)
    assert expected.std() > 0.5


def test_it_is_frozen_and_measured_by_a_frechet_distance_of_its_own_name(folder, generator):
    network = DINOv2Features(folder)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    quality = FeatureMetrics(network)
    assert quality.columns == ["fd_dinov2"]
    quality.update(uint8_images(20, 16, generator, channels=1), real=True)
    quality.update(uint8_images(20, 16, generator, channels=1), real=False)
    assert quality.compute()["fd_dinov2"] > 0


def test_a_missing_model_and_a_missing_library_are_named(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match=r"no Dinov2Model at .*nothing: "):
        DINOv2Features(str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers.*'dinov2'"):
        DINOv2Features(folder)


def test_other_channels_are_refused(folder):
    network = DINOv2Features(folder)
    with pytest.raises(ValueError, match=r"images \(b, 1 or 3, h, w\): got \(1, 2, 8, 8\)"):
        network(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))
