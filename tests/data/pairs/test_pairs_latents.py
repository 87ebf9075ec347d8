"""decm encode-pairs: stored latents and captions for training, interrupted runs, and errors."""

import errno
import logging
import os
import resource
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast

from decm_lightning import cli
from decm_lightning.data.latents import cached as pairs_latents
from decm_lightning.data.pairs.text_image_pairs import TextImagePairs
from decm_lightning.text import TextEncoder
from tests.autoencoders.tiny import save_dc, save_kl

COUNT = 11
SIZE = 16


@pytest.fixture
def pixels(tmp_path, monkeypatch):
    """Write 11 pairs of noise, a VAE and a text encoder; return the images, (11, 3, 16, 16), uint8."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(pairs_latents, "BATCH", 4)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    (tmp_path / "pairs").mkdir()
    rows = ["file_name,caption"]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"pairs/{number:02d}.png")
        rows.append(f"{number:02d}.png,{'abcdefghijk'[number]}")
    (tmp_path / "pairs/all.csv").write_text("\n".join(rows) + "\n")
    save_kl(tmp_path / "vae")
    (tmp_path / "encoder").mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijk"]
    (tmp_path / "encoder/vocab.txt").write_text("\n".join(pieces))
    BertTokenizerFast(vocab="encoder/vocab.txt").save_pretrained("encoder")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained("encoder")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture
def decm(pixels, monkeypatch, capsys):
    """Return a function that runs decm encode-pairs and returns (code, out, err)."""

    def run(*argv):
        source, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("pairs", argv)
        base = [source, "--size", str(SIZE), "--out", "cache", "--device", "cpu"]
        base += ["--encoder", "decm_lightning.text.TextEncoder", "--encoder.path", "encoder"]
        monkeypatch.setattr(sys, "argv", ["decm", "encode-pairs", *base, *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def ready(latents="cached", vae="vae"):
    data = TextImagePairs(
        "pairs", SIZE, TextEncoder("encoder"), "cache", vae=vae, latents=latents, held_out=0.3, num_workers=0
    )
    data.setup("fit")
    return data


def test_training_finds_all_and_encodes_nothing(decm, pixels, monkeypatch):
    """Latents match diffusers, in the order of the pairs. Neither the VAE nor the text encoder runs again."""
    code, out, _ = decm("--vae", "vae")
    assert (code, out.splitlines()[-1]) == (0, "11 pairs: latents of vae and captions are in cache")
    model = AutoencoderKL.from_pretrained("vae").eval()
    with torch.no_grad():
        expected = model.encode(pixels.float() / 127.5 - 1).latent_dist.mode() * model.config.scaling_factor

    def refuse(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(pairs_latents, "_write", refuse)
    monkeypatch.setattr(TextEncoder, "__call__", refuse)
    monkeypatch.setattr(TextEncoder, "to", refuse)
    data = ready()
    for part in (data.train, data.reference):
        batch = part.__getitems__(range(len(part)))
        torch.testing.assert_close(batch.x_1, expected[part.rows], rtol=1e-3, atol=1e-3)
        assert torch.equal(data.on_after_batch_transfer(batch, 0).x_1, batch.x_1)
    assert len(data.train) + len(data.reference) == COUNT
    assert len(data.reference)


def test_cached_latents_are_those_on_the_fly(decm):
    assert decm("--vae", "vae")[0] == 0
    cached, fly = (
        data.on_after_batch_transfer(data.train.__getitems__(range(5)), 0) for data in (ready(), ready("on_the_fly"))
    )
    torch.testing.assert_close(cached.x_1, fly.x_1, rtol=1e-3, atol=1e-3)
    assert torch.equal(cached.condition.tokens, fly.condition.tokens)


@pytest.mark.parametrize("cut", [0, 1, 3000])
def test_an_interrupted_run_resumes_to_the_same_bytes(cut, decm, tmp_path, monkeypatch):
    """The run stops after one batch and part of the next. Only the partial batch is encoded again."""
    assert decm("--vae", "vae")[0] == 0
    (file,) = (tmp_path / "cache").glob("pairs-*/latents-*.bin")
    whole = file.read_bytes()
    batch = len(whole) // COUNT * 4
    file.unlink()
    marked = b"\0" * 8 + whole[8:batch]
    file.with_suffix(".partial").write_bytes(marked + whole[batch : batch + cut])
    code, _, _ = decm("--vae", "vae")
    assert code == 0
    assert file.read_bytes() == marked + whole[batch:]
    assert not list(file.parent.glob("*.partial"))


def test_a_partial_file_of_another_vae_is_not_used(decm, tmp_path):
    """The partial file is of another VAE with the same shapes, interrupted after its first batch."""
    assert decm("--vae", "vae")[0] == 0
    (file,) = (tmp_path / "cache").glob("pairs-*/latents-*.bin")
    whole = file.read_bytes()
    file.unlink()
    file.with_suffix(".partial").write_bytes(b"\0" * (len(whole) // COUNT * 4))
    model = AutoencoderKL.from_pretrained("vae")
    with torch.no_grad():
        model.encoder.conv_in.bias += 1
    model.save_pretrained("other")
    assert decm("--vae", "other")[0] == 0
    (other,) = (tmp_path / "cache").glob("pairs-*/latents-*.bin")
    assert other.name != file.name
    assert other.read_bytes()[:100].strip(b"\0")


@pytest.mark.parametrize("keep", [0, 100])
def test_latents_of_the_wrong_size_are_named(keep, decm, tmp_path):
    assert decm("--vae", "vae")[0] == 0
    (file,) = (tmp_path / "cache").glob("pairs-*/latents-*.bin")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:keep])
    code, _, err = decm("--vae", "vae")
    assert code == 2
    assert f"{file.relative_to(tmp_path)} is damaged ({keep} bytes, expected {size}): delete it" in err


def test_a_full_disk_is_named_and_the_run_resumes(decm, tmp_path):
    """A limit on the file size fails in the same place as a full disk."""
    assert decm("--vae", "vae")[0] == 0
    (file,) = (tmp_path / "cache").glob("pairs-*/latents-*.bin")
    whole = file.read_bytes()
    file.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        code, _, err = decm("--vae", "vae")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert str(file.relative_to(tmp_path)) in err
    assert os.strerror(errno.EFBIG) in err
    assert decm("--vae", "vae")[0] == 0
    assert file.read_bytes() == whole


def test_another_vae_has_its_own_file(decm, tmp_path):
    save_dc(tmp_path / "other")
    for vae in ("vae", "other", "vae"):
        assert decm("--vae", vae)[0] == 0
    assert len(list((tmp_path / "cache").glob("pairs-*/latents-*.bin"))) == 2
    assert ready(vae="other").train.images.shape[1:] == (4, 4, 4)


def test_without_a_vae_pixels_are_stored(decm, pixels):
    code, out, _ = decm("--captions", "on_the_fly")
    assert (code, out.splitlines()[-1]) == (0, "11 pairs: pixels are in cache")
    assert torch.equal(ready(vae=None).train.images, pixels)


def test_latents_beyond_half_precision_are_refused_by_the_name_of_their_image(decm):
    model = AutoencoderKL.from_pretrained("vae")
    model.register_to_config(scaling_factor=1e7)
    model.save_pretrained("vae")
    code, _, err = decm("--vae", "vae")
    assert code == 2
    assert "the latent of 00.png is not finite in float16" in err


BAD = {
    "no source": (["nowhere"], "no folder or file at nowhere"),
    "size": (["--vae", "vae", "--size", "15"], "size must be a multiple of 2, the VAE's downsampling: got 15"),
    "no VAE": (["--vae", "not/there/at/all"], "VAE not/there/at/all not found, "),
    "encoder": (["--encoder", "Nothing"], "encoder"),
    "device": (["--device", "nothing"], "device 'nothing' is not available"),
    "no size": (["--size", "0"], "size must be at least 1: got 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_errors_are_one_line(kind, decm):
    argv, message = BAD[kind]
    code, _, err = decm(*argv)
    assert code == 2
    assert message in err
    assert err.splitlines()[-1].startswith("decm: error: ")
    assert "Traceback" not in err


def test_a_fault_is_fatal_or_left_out(decm, tmp_path):
    (tmp_path / "pairs/03.png").write_bytes(b"no image")
    code, _, err = decm()
    assert code == 2
    assert "1 of 11 pairs of pairs are bad" in err
    code, out, _ = decm("--on_error", "skip")
    assert (code, out.splitlines()[-1]) == (0, "10 pairs: pixels and captions are in cache")
