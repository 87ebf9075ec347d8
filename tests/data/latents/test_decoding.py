"""Decode training latents into images, and refuse a VAE that did not encode them."""

import json

import lightning as L
import pytest
import torch

from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.data import Digits, ImageNetLatents
from tests.autoencoders.tiny import save_kl
from tests.data.latents.test_latents import Recorder
from tests.data.latents.test_shards import write_shards


def data(folder, **options):
    return ImageNetLatents(str(folder), **({"batch_size": 4, "num_workers": 0, "num_classes": 10} | options))


@pytest.fixture
def folder(tmp_path):
    """50 latents in two shards whose record names the VAE in `vae`. The labels are 0, 1, ... 9, 0, 1, ..."""
    save_kl(tmp_path / "vae")
    write_shards(tmp_path, (30, 20))
    content = json.loads((tmp_path / "cache.json").read_text())
    content["vae"] = load_autoencoder(tmp_path / "vae").identity
    (tmp_path / "cache.json").write_text(json.dumps(content))
    return tmp_path


def test_decoding_inverts_the_scaling_and_calls_the_vae(folder):
    latents = data(folder, vae=str(folder / "vae"))
    latents.setup("fit")
    autoencoder = load_autoencoder(folder / "vae")
    rows = range(40)
    x = latents.train.__getitems__(rows).x_1
    raw = latents.train.shards.read(rows)
    assert (x - raw).abs().mean() > 1
    # More than one chunk.
    images = latents.decode(x)
    assert images.shape == (40, 3, 8, 8)
    torch.testing.assert_close(images, autoencoder.decode(raw), atol=1e-5, rtol=0)
    assert latents.decode(x.requires_grad_()).requires_grad is False


def test_a_bare_multiplier_is_undone_too(folder):
    (folder / "cache.json").unlink()
    latents = data(folder, vae=str(folder / "vae"), latent_norm=False, latent_multiplier=0.2)
    latents.train = None
    with pytest.warns(UserWarning, match="VAE"):
        latents.setup("fit")
    raw = latents.train.shards.read(range(4))
    torch.testing.assert_close(
        latents.decode(0.2 * raw), load_autoencoder(folder / "vae").decode(raw), atol=1e-5, rtol=0
    )


def test_without_a_vae_latents_cannot_be_decoded(folder):
    latents = data(folder)
    latents.setup("fit")
    with pytest.raises(ValueError, match=r"decoder.*--data\.init_args\.vae"):
        latents.decode(torch.zeros(1, 2, 4, 4))


def test_the_vae_is_released_to_the_cpu(folder):
    latents = data(folder, vae=str(folder / "vae"))
    latents.release()
    latents.setup("fit")
    moved = []
    latents.coder.autoencoder.to = moved.append
    latents.release()
    assert moved == ["cpu"]


def test_pixels_need_no_decoding():
    x = torch.rand(2, 1, 8, 8)
    assert Digits().decode(x) is x


def test_another_vae_is_refused(folder, tmp_path):
    save_kl(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"cache.json says that AutoencoderKL .*/other is Auto"):
        data(folder, vae=str(tmp_path / "other")).setup("fit")


def test_a_vae_of_other_channels_is_refused(folder, tmp_path):
    (folder / "cache.json").unlink()
    save_kl(tmp_path / "other", latent_channels=4)
    with (
        pytest.warns(UserWarning, match="unknown"),
        pytest.raises(ValueError, match=r"2 channels.* 4$"),
    ):
        data(folder, vae=str(tmp_path / "other")).setup("fit")


@pytest.mark.parametrize(("size", "expected"), [(None, range(50)), (60, range(50)), (10, range(0, 50, 5))])
def test_reference_latents_are_spread_over_all_shards(size, expected, folder):
    latents = data(folder, vae=str(folder / "vae"), reference_size=size)
    latents.setup("test")
    for loader in (latents.val_dataloader(), latents.test_dataloader()):
        (batch,) = loader
        assert torch.equal(batch.x_1, latents.train.__getitems__(expected).x_1)
        assert batch.condition.tolist() == [number % 10 for number in expected]


def test_a_reference_of_nothing_is_refused(folder):
    with pytest.raises(ValueError, match=r"reference_size.*got 0"):
        data(folder, reference_size=0)


class Watcher(Recorder):
    """Records the validation batches."""

    def validation_step(self, batch, batch_idx):
        self.batches.append(batch)


@pytest.mark.parametrize(("vae", "rows"), [(None, 0), ("vae", 6)])
def test_a_fit_validates_if_there_is_a_vae(vae, rows, folder):
    watcher = Watcher()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, limit_train_batches=1, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(watcher, data(folder, vae=vae and str(folder / vae), reference_size=6))
    assert trainer.global_step == 1
    assert sum(len(batch.x_1) for batch in watcher.batches[1:]) == rows
