import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from decm_lightning.metrics import FeatureMetrics, InceptionFeatures, inception
from decm_lightning.metrics.inception import resize
from decm_lightning.metrics.inception_network import Inception
from tests.metrics.networks import COLUMNS, seeded, uint8_images
from tests.unprivileged import open_folder, unprivileged

FIXTURE = Path(__file__).parents[1] / "fixtures" / "inception_outputs.safetensors"
SEED = 7


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights with the names of the public ones, in a file named by its hash."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(seeded(Inception(), SEED), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    return (folder / "weights.pth").rename(folder / f"weights-{digest[:8]}.pth")


@pytest.fixture(scope="module")
def network(weights) -> InceptionFeatures:
    return InceptionFeatures(str(weights))


def test_features_are_those_of_the_public_implementation(network):
    with safe_open(FIXTURE, "pt") as stored:
        made = json.loads(stored.metadata()["made"])
        expected = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    assert made["weights_seed"] == SEED
    for side in made["sides"]:
        generator = torch.Generator().manual_seed(made["images_seed"])
        views = network(uint8_images(made["images"], side, generator))
        assert set(views) == {"pool", "spatial", "logits"}
        for name, value in views.items():
            target = expected[f"{name}_{side}"]
            assert value.shape == target.shape
            assert (value - target).norm() < 1e-5 * target.norm()
            torch.testing.assert_close(value, target, rtol=1e-4, atol=1e-5 * target.abs().max().item())


def test_spatial_features_are_rows_by_columns_by_channels_of_the_first_branch(network):
    seen = []
    hook = network.network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[2]))
    views = network(uint8_images(2, 32, torch.Generator().manual_seed(0)))
    hook.remove()
    # The order in which numpy flattens ADM's activations, whose channels come last.
    expected = np.transpose(seen[0].numpy(), (0, 2, 3, 1))[..., :7].reshape(2, -1)
    assert views["spatial"].shape == (2, 2023)
    np.testing.assert_array_equal(views["spatial"].numpy(), expected)


def test_grey_images_are_three_equal_channels_and_other_numbers_are_refused(network):
    grey = uint8_images(2, 32, torch.Generator().manual_seed(0), channels=1)
    assert torch.equal(network(grey)["pool"], network(grey.expand(-1, 3, -1, -1))["pool"])
    with pytest.raises(ValueError, match=r"images \(b, 1 or 3, h, w\): got \(2, 4, 8, 8\)"):
        network(torch.zeros(2, 4, 8, 8, dtype=torch.uint8))


def test_resizing_is_tensorflows(generator):
    images = torch.rand(1, 2, 5, 11, generator=generator)
    resized = resize(images, 7)
    for row in range(7):
        for column in range(7):
            y, x = row * 5 / 7, column * 11 / 7
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 10)
            above = images[..., top, left] * (1 - x + left) + images[..., top, right] * (x - left)
            below = images[..., bottom, left] * (1 - x + left) + images[..., bottom, right] * (x - left)
            torch.testing.assert_close(resized[..., row, column], above * (1 - y + top) + below * (y - top))
    # torch's interpolation adds half a pixel, so it differs.
    assert not torch.allclose(resized, torch.nn.functional.interpolate(images, (7, 7), mode="bilinear"), atol=0.05)


def test_weights_are_frozen_named_and_give_all_columns(network, weights):
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert network.name == f"Inception with other weights ({weights.stem[-8:]})"
    assert FeatureMetrics(network).columns == COLUMNS
    assert FeatureMetrics(network, validation=True).columns == ["fid", "kid"]


def test_weights_are_downloaded_once_and_checked(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "FILE", weights.name)
    monkeypatch.setattr(inception, "URL", weights.as_uri())
    InceptionFeatures()
    cached = tmp_path / "checkpoints" / weights.name
    assert cached.read_bytes() == weights.read_bytes()
    monkeypatch.setattr(inception, "URL", "file:///nowhere")
    InceptionFeatures()

    cached.unlink()
    wrong = weights.with_name("weights-00000000.pth")
    wrong.symlink_to(weights)
    monkeypatch.setattr(inception, "FILE", wrong.name)
    monkeypatch.setattr(inception, "URL", wrong.as_uri())
    with pytest.raises(OSError, match="invalid hash value"):
        InceptionFeatures()


def test_without_a_network_one_line_says_where_the_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL", "file:///nowhere/weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(OSError, match="cannot be downloaded") as error:
        InceptionFeatures()
    text = str(error.value)
    assert "\n" not in text
    assert str(tmp_path / "checkpoints" / inception.FILE) in text
    assert "argument `weights` of InceptionFeatures" in text


def test_weights_cut_short_or_not_finite_are_refused(weights, tmp_path):
    content = weights.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        InceptionFeatures(str(tmp_path / "cut.pth"))
    state = torch.load(weights, weights_only=True)
    name = next(name for name in state if name.endswith("weight"))
    torch.save(state | {name: state[name] * float("nan")}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=rf"nan\.pth has NaN or infinite weights: {name}"):
        InceptionFeatures(str(tmp_path / "nan.pth"))


def test_a_file_that_may_not_be_read_is_not_a_missing_one():
    with open_folder() as folder:
        (folder / "a.pth").touch(mode=0)
        with unprivileged(), pytest.raises(PermissionError, match=f"Permission denied: '{folder}/a.pth'"):
            InceptionFeatures(str(folder / "a.pth"))


def test_files_without_these_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*none\.pth: .*weights-inc"):
        InceptionFeatures(str(tmp_path / "none.pth"))
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(ValueError, match=r"text\.pth.*'no "):
        InceptionFeatures(str(tmp_path / "text.pth"))
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"lfs\.pth.*git-lfs"):
        InceptionFeatures(str(tmp_path / "lfs.pth"))
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{tmp_path}'"):
        InceptionFeatures(str(tmp_path))
    for content in ({"ema": {"fc.weight": torch.zeros(2)}}, [torch.zeros(2)]):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth must .*weights-inception"):
            InceptionFeatures(str(tmp_path / "other.pth"))
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"torchvision\.pth .*Conv2d_1a_3x3"):
        InceptionFeatures(str(tmp_path / "torchvision.pth"))
