"""Latents and images of a pipeline's VAE, compared with diffusers' model and the pipelines' formulas."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from decm_lightning.autoencoders import LatentCoder, latent_coder, load_autoencoder
from tests.autoencoders.tiny import save_dc, save_kl, save_tiny


@pytest.fixture
def images():
    return torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def save_with(folder, **numbers):
    """Write an AutoencoderKL with these numbers in its config, and return it."""
    model = AutoencoderKL.from_pretrained(save_kl(folder))
    model.register_to_config(**numbers)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("shift", [0.0609, None])
def test_latents_are_normalized_as_the_pipelines_do(shift, images, tmp_path, monkeypatch):
    """The decoded images match the last lines of the pipelines, with any chunk size."""
    monkeypatch.setattr(latent_coder, "PIXELS_AT_ONCE", 4 * 16 * 16)
    model = save_with(tmp_path / "vae", scaling_factor=1.5305, shift_factor=shift)
    coder = LatentCoder(load_autoencoder(tmp_path))
    with torch.no_grad():
        expected = (model.encode(images).latent_dist.mode() - (shift or 0)) * 1.5305
        images_of_pipeline = model.decode(expected / 1.5305 + (shift or 0)).sample.clamp(-1, 1)
    x = coder.encode(images)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(coder.decode(x), images_of_pipeline, rtol=0, atol=1e-5)
    assert x.shape == (7, 2, 8, 8)
    assert coder.encode(images.bfloat16()).dtype == torch.bfloat16


def test_autoencoders_without_a_posterior_have_latents_too(images, tmp_path):
    """AutoencoderDC, which Sana uses, and AutoencoderTiny, with the scaling_factor in their configs."""
    coder = LatentCoder(load_autoencoder(save_dc(tmp_path / "dc")))
    model = coder.autoencoder.model
    with torch.no_grad():
        expected = model.encode(images).latent * model.config.scaling_factor
    torch.testing.assert_close(coder.encode(images), expected, rtol=0, atol=1e-5)
    coder = LatentCoder(load_autoencoder(save_tiny(tmp_path / "tiny")))
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(tmp_path / "tiny").eval().encode(images).latents
    torch.testing.assert_close(coder.encode(images), expected, rtol=0, atol=1e-5)
