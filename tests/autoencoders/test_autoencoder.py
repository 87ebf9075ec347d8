"""The autoencoders of diffusers behind one interface: latents, images, identities, and refused files."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from decm_lightning.autoencoders import load_autoencoder
from tests.autoencoders.tiny import save_dc, save_kl, save_tiny
from tests.unprivileged import open_folder, unprivileged

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {"AutoencoderKL": (save_kl, 2, 2), "AutoencoderDC": (save_dc, 4, 4), "AutoencoderTiny": (save_tiny, 3, 2)}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Do not contact the hub, which is slow to fail without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(kind, images, tmp_path):
    save, channels, downsampling = KINDS[kind]
    autoencoder = load_autoencoder(save(tmp_path))
    model = getattr(diffusers, kind).from_pretrained(tmp_path).eval()
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (channels, downsampling)
    # The first output of each class in the tuples of diffusers: the posterior, or the latents.
    (encoded,) = model.encode(images, return_dict=False)
    expected = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    latents = autoencoder.encode(images)
    assert latents.shape == (3, *autoencoder.latent_shape(16))
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)
    decoded = model.decode(20 * latents, return_dict=False)[0]
    assert decoded.abs().max() > 1
    torch.testing.assert_close(autoencoder.decode(20 * latents), decoded.clamp(-1, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_noise_samples_the_posterior(images, tmp_path):
    autoencoder = load_autoencoder(save_kl(tmp_path))
    posterior = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval().encode(images).latent_dist
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, 2, 8, 8, generator=generator)
    expected = posterior.sample(torch.Generator().manual_seed(3))
    assert (expected - posterior.mode()).abs().mean() > 0.01
    torch.testing.assert_close(autoencoder.encode(images, noise), expected)


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny"])
def test_without_a_posterior_noise_changes_nothing(kind, images, tmp_path):
    autoencoder = load_autoencoder(KINDS[kind][0](tmp_path))
    latents = autoencoder.encode(images)
    assert torch.equal(autoencoder.encode(images, torch.randn_like(latents)), latents)


def test_the_identity_follows_from_class_and_weights_alone(tmp_path):
    first, other = (load_autoencoder(save_kl(tmp_path / str(seed), seed)) for seed in (0, 1))
    assert first.identity.startswith("AutoencoderKL ")
    assert first.identity != other.identity
    first.model.config.scaling_factor = 7
    first.model.save_pretrained(tmp_path / "again")
    assert load_autoencoder(tmp_path / "again").identity == first.identity
    tensors = load_file(tmp_path / "0" / WEIGHTS)
    tensors["decoder.conv_out.bias"][0] += 1e-6
    save_file(tensors, tmp_path / "0" / WEIGHTS, metadata={"format": "pt"})
    assert load_autoencoder(tmp_path / "0").identity != first.identity


def test_a_pipelines_folder_is_searched(tmp_path):
    save_kl(tmp_path / "vae")
    assert load_autoencoder(tmp_path).identity == load_autoencoder(tmp_path / "vae").identity


def test_weights_in_half_precision_alone_are_read(tmp_path, caplog):
    """Pipelines are often downloaded in half precision; full-precision weights take precedence."""
    expected = load_autoencoder(save_kl(tmp_path)).identity
    load_autoencoder(tmp_path).model.half().save_pretrained(tmp_path, variant="fp16")
    assert load_autoencoder(tmp_path).identity == expected
    assert not caplog.messages
    (tmp_path / WEIGHTS).unlink()
    autoencoder = load_autoencoder(tmp_path)
    assert autoencoder.identity != expected
    assert {tensor.dtype for tensor in autoencoder.state_dict().values()} == {torch.float32}
    assert caplog.messages == [f"{tmp_path} only has fp16 weights: using those"]
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        load_autoencoder(tmp_path)


def test_weights_that_may_not_be_read_are_not_missing():
    with open_folder() as folder:
        save_kl(folder)
        (folder / WEIGHTS).chmod(0)
        with unprivileged(), pytest.raises(ValueError, match=f"{folder / WEIGHTS} cannot be read: permission denied"):
            load_autoencoder(folder)


def test_it_stays_frozen_and_in_eval_mode(tmp_path):
    autoencoder = load_autoencoder(save_kl(tmp_path)).train()
    assert not any(module.training for module in autoencoder.modules())
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())


def test_a_size_that_is_not_a_multiple_is_refused(tmp_path):
    autoencoder = load_autoencoder(save_dc(tmp_path))
    assert autoencoder.latent_shape(64) == (4, 16, 16)
    with pytest.raises(ValueError, match=r"size.*got 18"):
        autoencoder.latent_shape(18)


def drop(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def add(folder):
    save_file(load_file(folder / WEIGHTS) | {"more": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})


def describe(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


LFS = f"{WEIGHTS} cannot be read: a git-lfs pointer instead of the file: run git lfs pull"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "architecture; missing: decoder.conv_out.bias$"),
        (add, "architecture; unexpected: more$"),
        (
            describe(_class_name="UNet2DModel"),
            "is a UNet2DModel: .*AutoencoderKL, AutoencoderDC, AutoencoderTiny",
        ),
        (describe(_class_name=None), "_class_name.*AutoencoderKL"),
        (describe(latent_channels=3), "cannot be loaded: .*size mismatch for encoder.conv_out.weight"),
        (lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"), LFS),
        (lambda folder: (folder / WEIGHTS).write_text("<html>"), f"{WEIGHTS} cannot be read: a web page"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "read: cut short at"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON: "),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json must .* VAE: got list"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json in .*/vae"),
    ],
)
def test_a_folder_that_is_no_whole_vae_is_refused(spoil, message, tmp_path):
    spoil(save_kl(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_autoencoder(tmp_path)


def test_one_file_of_a_folder_is_not_a_vae(tmp_path):
    """Tensors in the names of diffusers do not determine the architecture, and files are not looked up on the hub."""
    save_kl(tmp_path)
    for name, message in ((WEIGHTS, "diffusers.* folder.*config.json"), ("config.json", "text instead of")):
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{message}"):
            load_autoencoder(tmp_path / name)


def test_what_is_nowhere_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VAE nobody/nothing .*folder.*hub"):
        load_autoencoder("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.pt"):
        load_autoencoder(tmp_path / "gone.pt")
