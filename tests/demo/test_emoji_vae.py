"""The training of the emoji VAE."""

import pytest
import torch

from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.demo import train_emoji_vae
from decm_lightning.demo.emoji import Emoji, base_of, emoji_files, read_emoji
from decm_lightning.demo.train_emoji_vae import (
    EmojiImages,
    EmojiVAE,
    PerceptualDistance,
    fit,
    normalize_latents,
    reconstruction,
)


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def module(images, steps=2):
    return EmojiVAE(images, latents=8, steps=steps, batch_size=2, rate=1e-3, perceptual=0.1, seed=0)


def test_resumed_run_equals_an_uninterrupted_one(images, tmp_path):
    whole = module(images)
    fit(whole, tmp_path / "whole", save_every=1)
    interrupted = module(images)
    interrupted.trained = []

    def stop(batch):
        interrupted.trained.append(batch)
        if len(interrupted.trained) == 2:
            raise RuntimeError("stopped")
        return EmojiVAE.training_step(interrupted, batch)

    interrupted.training_step = stop
    with pytest.raises(RuntimeError, match="stopped"):
        fit(interrupted, tmp_path / "resumed", save_every=1)
    resumed = module(images)
    fit(resumed, tmp_path / "resumed", save_every=1)
    assert resumed.global_step == 2
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


def test_output_is_a_small_autoencoder_with_eight_by_eight_latents(images, tmp_path):
    network = module(images).network.eval()
    network.half().save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < 2e6
    assert load_autoencoder(tmp_path).latent_shape(64) == (8, 8, 8)


def test_perceptual_distance_grows_with_blur(images):
    distance = PerceptualDistance().eval()
    real = images.float() / 127.5 - 1
    blurred = [torch.nn.functional.avg_pool2d(real, k, 1, k // 2) for k in (1, 3, 5)]
    near, middle, far = (distance(x, real).item() for x in blurred)
    assert near == 0 < middle < far


def test_reconstruction_error_of_a_known_shift(images):
    """A shift by 10 levels has a PSNR of 20 log10(255 / 10) dB."""

    class Shift:
        def encode(self, x):
            return type("Encoded", (), {"latent_dist": type("Posterior", (), {"mode": lambda self: x})()})()

        def decode(self, x):
            return type("Decoded", (), {"sample": x + 10 / 127.5})()

    record = reconstruction(Shift(), images.clamp(max=240))
    assert record["psnr"] == pytest.approx(28.13, abs=0.01)
    assert 0 < record["features"] < record["features_of_others"]


def test_emoji_that_the_pairs_hold_out_are_not_trained_on(tmp_path, monkeypatch):
    items = read_emoji()
    some = tmp_path / "some"
    some.mkdir()
    for file in list(emoji_files().values())[::60]:
        (some / file.name).symlink_to(file)
    data = EmojiImages(some)
    names = [base_of(code) for code in emoji_files(some)]
    held = train_emoji_vae.is_held_out(names, Emoji().held_out)
    assert len(data.held_out) == held.sum() > 0
    assert len(data.train) == (~held).sum() > len(data.held_out)
    assert {item.base for item in items if item.code in emoji_files(some)} <= set(names)


def test_latents_are_normalized_by_channel_without_changing_the_images(images):
    network = module(images).network.eval()
    torch.nn.init.normal_(network.quant_conv.bias, std=3.0, generator=torch.Generator().manual_seed(0))
    real = images.float() / 127.5 - 1
    with torch.no_grad():
        before, noise = network.encode(real).latent_dist, torch.randn(6, 8, 8, 8)
        decoded = network.decode(before.mean + before.std * noise).sample
        normalize_latents(network, images)
        after = network.encode(real).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4)
        assert torch.allclose(network.decode(after.mean + after.std * noise).sample, decoded, atol=1e-4)


def test_emoji_as_latents_are_decoded_again(images, tmp_path, monkeypatch):
    items = read_emoji()[::300]
    monkeypatch.setattr("decm_lightning.demo.emoji.read_emoji", lambda: items)
    network = module(images).network.eval()
    normalize_latents(network, images)
    network.half().save_pretrained(tmp_path / "vae")

    def ready(**options):
        data = Emoji(batch_size=2, size=64, cache=str(tmp_path), held_out=0, variants=1, **options)
        data.prepare_data()
        data.setup("fit")
        return data

    data = ready(vae=str(tmp_path / "vae"))
    latents = data.train.__getitems__(range(len(items))).x_1
    assert latents.shape == (len(items), 8, 8, 8)
    pixels = ready().train.__getitems__(range(len(items))).x_1
    with torch.no_grad():
        autoencoder = load_autoencoder(tmp_path / "vae")
        expected = autoencoder.decode(autoencoder.encode(pixels))
    assert torch.allclose(data.decode(latents), expected, atol=0.02)
    assert data.record().vae.identity == autoencoder.identity
