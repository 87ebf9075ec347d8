"""Latent diffusion checkpoints such as VA-VAE, compared with a forward pass that uses the original tensor names."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch.nn import functional as F

from decm_lightning.autoencoders import ldm, load_autoencoder
from tests.unprivileged import open_folder, unprivileged

VAVAE = {"width": 128, "multiples": (1, 1, 2, 2, 4), "attentive": (4,), "channels": 32}
SMALL = {"width": 32, "multiples": (1, 1, 2), "attentive": (2,), "channels": 4}


def names_and_shapes(width, multiples, attentive, channels, blocks=2):
    """Return the tensors of LDM's AutoencoderKL: {name without .weight: shape of the weight}."""
    shapes = {}
    widths = [width * multiple for multiple in multiples]

    def resnet(name, old, new):
        shapes.update({f"{name}.norm1": (old,), f"{name}.conv1": (new, old, 3, 3)})
        shapes.update({f"{name}.norm2": (new,), f"{name}.conv2": (new, new, 3, 3)})
        if old != new:
            shapes[f"{name}.nin_shortcut"] = (new, old, 1, 1)

    def attention(name, width):
        shapes[f"{name}.norm"] = (width,)
        shapes.update({f"{name}.{part}": (width, width, 1, 1) for part in ("q", "k", "v", "proj_out")})

    def level(name, number, count, old):
        for block in range(count):
            resnet(f"{name}.{number}.block.{block}", old, widths[number])
            if number in attentive:
                attention(f"{name}.{number}.attn.{block}", widths[number])
            old = widths[number]
        return old

    last = len(widths) - 1
    now = width
    for number in range(last + 1):
        now = level("encoder.down", number, blocks, now)
        if number != last:
            shapes[f"encoder.down.{number}.downsample.conv"] = (now, now, 3, 3)
    for number in reversed(range(last + 1)):
        now = level("decoder.up", number, blocks + 1, now)
        if number:
            shapes[f"decoder.up.{number}.upsample.conv"] = (now, now, 3, 3)
    for part in ("encoder", "decoder"):
        resnet(f"{part}.mid.block_1", widths[-1], widths[-1])
        attention(f"{part}.mid.attn_1", widths[-1])
        resnet(f"{part}.mid.block_2", widths[-1], widths[-1])
    shapes.update({"encoder.conv_in": (width, 3, 3, 3), "encoder.norm_out": (widths[-1],)})
    shapes.update({"encoder.conv_out": (2 * channels, widths[-1], 3, 3), "decoder.norm_out": (width,)})
    shapes.update({"decoder.conv_in": (widths[-1], channels, 3, 3), "decoder.conv_out": (3, width, 3, 3)})
    shapes.update({"quant_conv": (2 * channels,) * 2 + (1, 1), "post_quant_conv": (channels, channels, 1, 1)})
    return shapes


def checkpoint(generator=None, **options):
    """Return random tensors with LDM's names; without a generator, they are on the meta device."""
    tensors = {}
    for name, shape in names_and_shapes(**options).items():
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            if generator is None:
                tensors[f"{name}.{kind}"] = torch.empty(size, device="meta")
            else:
                scale = math.prod(shape[1:]) ** -0.5 if len(size) > 1 else 0.3
                tensors[f"{name}.{kind}"] = scale * torch.randn(size, generator=generator)
    return tensors


class Forward:
    """LDM's AutoencoderKL as functions of its tensors, in float64."""

    def __init__(self, tensors, multiples, attentive, **_):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.levels, self.attentive = len(multiples), attentive

    def of(self, name):
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def conv(self, name, x, **options):
        weight, bias = self.of(name)
        return F.conv2d(x, weight, bias, **({"padding": weight.shape[-1] // 2} | options))

    def norm(self, name, x):
        groups = x.reshape(len(x), 32, -1)
        std, mean = torch.std_mean(groups, -1, correction=0, keepdim=True)
        weight, bias = (value[:, None, None] for value in self.of(name))
        return ((groups - mean) / (std**2 + 1e-6).sqrt()).reshape(x.shape) * weight + bias

    def resnet(self, name, x):
        hidden = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        hidden = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden)))
        return hidden + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.bias" in self.tensors else x)

    def attention(self, name, x):
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        weights = torch.einsum("bcq,bck->bqk", q, k).mul(q.shape[1] ** -0.5).softmax(-1)
        attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", attended)

    def level(self, name, number, blocks, x):
        for block in range(blocks):
            x = self.resnet(f"{name}.{number}.block.{block}", x)
            x = self.attention(f"{name}.{number}.attn.{block}", x) if number in self.attentive else x
        return x

    def ends(self, part, x):
        x = self.resnet(f"{part}.mid.block_1", x)
        return self.resnet(f"{part}.mid.block_2", self.attention(f"{part}.mid.attn_1", x))

    def encode(self, x):
        x = self.conv("encoder.conv_in", x)
        for number in range(self.levels):
            x = self.level("encoder.down", number, 2, x)
            if number != self.levels - 1:
                x = self.conv(f"encoder.down.{number}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", self.ends("encoder", x))))
        mean, log_variance = self.conv("quant_conv", x).chunk(2, 1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def decode(self, z):
        x = self.ends("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for number in reversed(range(self.levels)):
            x = self.level("decoder.up", number, 3, x)
            if number:
                x = self.conv(f"decoder.up.{number}.upsample.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


@pytest.fixture
def tensors(generator):
    return checkpoint(generator, **SMALL)


def wrapped(tensors):
    """The published training checkpoint of VA-VAE, which also contains tensors of other networks."""
    others = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    others |= {"foundation_model.model.cls_token": torch.zeros(1), "linear_proj.weight": torch.zeros(1)}
    return {"state_dict": tensors | others, "global_step": 3, "epoch": 1}


@pytest.mark.parametrize("form", ["training", "bare", "safetensors", "whole model"])
def test_a_checkpoint_computes_what_its_tensors_say(form, tensors, generator, tmp_path):
    file = tmp_path / ("vae.safetensors" if form == "safetensors" else "vae.pt")
    if form == "safetensors":
        save_file(tensors, file)
    elif form == "whole model":
        torch.save({"state_dict": {f"first_stage_model.{n}": t for n, t in tensors.items()}}, file)
    else:
        torch.save(wrapped(tensors) if form == "training" else tensors, file)
    autoencoder = load_autoencoder(file)
    assert autoencoder.latent_shape(32) == (4, 8, 8)
    autoencoder.model.double()
    reference = Forward(tensors, **SMALL)
    images = torch.rand(2, 3, 32, 32, generator=generator).double() * 2 - 1
    noise = torch.randn(2, 4, 8, 8, generator=generator).double()
    mean, std = reference.encode(images)
    torch.testing.assert_close(autoencoder.encode(images), mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(autoencoder.encode(images, noise), mean + std * noise, atol=1e-9, rtol=0)
    decoded = reference.decode(noise)
    assert decoded.abs().mean() > 0.1
    torch.testing.assert_close(autoencoder.decode(noise), decoded.clamp(-1, 1), atol=1e-9, rtol=0)


def test_every_tensor_of_vavae_f16d32_has_its_place():
    tensors = checkpoint(**VAVAE)
    config = ldm.architecture(tensors)
    assert config["latent_channels"] == 32
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict()
    converted = ldm.converted(tensors)
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in expected.items()}


def test_names_are_those_of_diffusers_own_converter(generator):
    # It does not support attention inside the levels.
    tensors = checkpoint(generator, **(SMALL | {"attentive": ()}))
    expected = convert_ldm_vae_checkpoint(tensors, ldm.architecture(tensors))
    converted = ldm.converted(tensors)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_a_converted_file_and_its_folder_are_the_same_vae(tensors, tmp_path):
    torch.save(tensors, tmp_path / "vae.pt")
    autoencoder = load_autoencoder(tmp_path / "vae.pt")
    autoencoder.model.save_pretrained(tmp_path / "vae")
    assert load_autoencoder(tmp_path / "vae").identity == autoencoder.identity


WRAPPED = {
    "model": lambda tensors: {"model": tensors, "optimizer": {"state": {}, "lr": 1.0}, "step": 3},
    "ema": lambda tensors: {"ema": tensors, "model": {name: 0 * tensor for name, tensor in tensors.items()}},
    "module.": lambda tensors: {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
    "both": lambda tensors: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}},
    "deep": lambda tensors: {"model": {"state_dict": tensors}, "epoch": 1},
    "latent diffusion": lambda tensors: {
        "state_dict": {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
        | {"model.diffusion_model.out.weight": torch.zeros(2), "cond_stage_model.x": torch.zeros(1)}
    },
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_tensors_are_found_wherever_training_scripts_put_them(layout, tensors, tmp_path):
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save(WRAPPED[layout](tensors), tmp_path / "vae.pt")
    assert load_autoencoder(tmp_path / "vae.pt").identity == load_autoencoder(tmp_path / "plain.pt").identity


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_may_not_be_read_is_not_a_missing_one(suffix, tensors):
    with open_folder() as folder:
        file = folder / f"vae{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(tensors, file)
        file.chmod(0)
        with unprivileged(), pytest.raises(PermissionError, match=f"Permission denied: '{file}'"):
            load_autoencoder(file)


def test_a_folder_that_is_called_like_a_file_is_said_to_be_one(tmp_path):
    (tmp_path / "vae.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*vae.safetensors"):
        load_autoencoder(tmp_path / "vae.safetensors")


def lacking(tensors):
    return {
        name: tensor for name, tensor in tensors.items() if name not in ("quant_conv.bias", "encoder.norm_out.bias")
    }


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, "vae.pt: .*; missing: encoder.conv_norm_out.bias, quant_conv.bias$"),
        (lambda tensors: tensors | {"encoder.more.weight": torch.zeros(1)}, "unexpected: encoder.more.weight$"),
        (
            lambda tensors: lacking(tensors) | {"encoder.more.weight": torch.zeros(1)},
            "missing: encoder.conv_norm_out.bias, quant_conv.bias; unexpected: encoder.more.weight$",
        ),
        (lambda tensors: tensors | {"quant_conv.bias": torch.zeros(3)}, "wrong shape: quant_conv.bias$"),
        (
            lambda tensors: tensors | {"encoder.conv_out.weight": torch.zeros(4, 64, 3, 3)},
            "encoder .* 8 channels: got 4",
        ),
        (lambda tensors: {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, "LDM AutoencoderKL: it lacks encoder"),
        (lambda tensors: [1, 2], "vae.pt: expected .*: got list"),
        (
            lambda tensors: {"model": {"a": 1}},
            "vae.pt: expected .* ema, state_dict, .*: got a",
        ),
        (
            lambda tensors: tensors | {"module.quant_conv.bias": torch.zeros(8)},
            "vae.pt: .*quant_conv.bias, .*module.quant_conv.bias: ",
        ),
        (lambda tensors: b"no checkpoint", "vae.pt cannot be read: text instead of tensors: it begins with 'no check"),
        (lambda tensors: b"version https://git-lfs.github.com/spec/v1", "vae.pt cannot be read: a git-lfs pointer"),
        (
            lambda tensors: {"state_dict": tensors, "rest": Path("x")},
            "pathlib.*, which could run code; if you",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_does_not(spoil, message, tensors, tmp_path):
    content = spoil(tensors)
    if isinstance(content, bytes):
        (tmp_path / "vae.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match=message) as refused:
        load_autoencoder(tmp_path / "vae.pt")
    assert "\n" not in str(refused.value)
