"""Network.generate returns the images of the commands, for labels and captions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from decm_lightning import cli, load, samplers
from decm_lightning.errors import NonFiniteError
from decm_lightning.image_writer import to_uint8
from decm_lightning.networks import MLP, DiT, TextDiT
from decm_lightning.text import MiniLM
from decm_lightning.types import Captions

WEIGHTS = Path(__file__).parents[2] / "weights"
TINY = {"input_size": 4, "patch_size": 2, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def student():
    return load(WEIGHTS / "digits/student")


@pytest.fixture
def latent_student():
    torch.manual_seed(0)
    return DiT(in_channels=4, num_classes=3, end_time=True, **TINY)


def pixels(images):
    """Return PIL images as an array (b, h, w) or (b, h, w, c)."""
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("options", [[], ["--sampler", "consistency", "--steps", "3"], ["--sampler", "mix?s1=0.6"]])
def test_images_are_those_of_decm_sample(options, student, tmp_path, monkeypatch):
    """The images are bit-identical for the same rows; the k-th image of class c is row k * 10 + c."""
    settings = ["--seed", "7", "--classes", "[3, 5]", "--per_class", "2", "--out", str(tmp_path / "images")]
    monkeypatch.setattr(sys, "argv", ["decm", "sample", str(WEIGHTS / "digits/student"), *settings, *options])
    assert cli.main() == 0
    found = {int(file.stem.split("_")[0]): file for file in (tmp_path / "images").rglob("*.png")}
    own = dict(zip(options[::2], options[1::2], strict=True))
    named = {"sampler": own.get("--sampler"), "steps": int(own.get("--steps", 2))}
    images = student.generate([3, 3, 5, 5], seed=7, rows=[3, 13, 5, 15], **named)
    assert all(image.mode == "L" and image.size == (8, 8) for image in images)
    assert sorted(found) == [3, 5, 13, 15]
    assert np.array_equal(pixels(images), pixels([Image.open(found[row]) for row in (3, 13, 5, 15)]))


def test_labels_may_be_a_number_a_list_a_tensor_or_left_out(student):
    """By default, row i has class i mod 10, as in `decm test`."""
    all_classes = pixels(student.generate())
    assert all_classes.shape == (10, 8, 8)
    assert np.array_equal(pixels(student.generate(range(10), steps=2)), all_classes)
    assert np.array_equal(pixels(student.generate(torch.arange(10))), all_classes)
    # Another batch size changes rounding.
    assert np.abs(pixels(student.generate(3, rows=[3]))[0].astype(int) - all_classes[3]).max() <= 1
    assert np.abs(pixels(student.generate(rows=range(8, 12)))[:2].astype(int) - all_classes[8:]).max() <= 1
    assert len(student.generate(3, rows=range(4))) == 4


def test_gradients_modes_and_dtype_stay_as_they_are(latent_student):
    """Images are generated in eval mode, and each submodule's mode is restored."""
    modes = []
    latent_student.train()
    latent_student.blocks[0].eval()
    latent_student.final_layer.register_forward_hook(lambda module, *_: modes.append(module.training))
    (image,) = latent_student.generate(1, decoder=lambda x: x[:, :3])
    assert image.mode == "RGB"
    assert modes == [False, False]
    assert latent_student.training
    assert latent_student.final_layer.training
    assert not latent_student.blocks[0].training
    assert torch.is_grad_enabled()


def test_latents_need_a_decoder(latent_student):
    """The decoder turns samples into images, which are clamped to [-1, 1] and rounded."""
    with pytest.raises(ValueError, match=r"latents \(4, 4, 4\).*decoder="):
        latent_student.generate([0, 1])
    seen = []

    def decode(x):
        seen.append(x)
        return torch.full((len(x), 3, 16, 16), 2.0)

    images = latent_student.generate([0, 1], decoder=decode)
    assert [image.size for image in images] == [(16, 16), (16, 16)]
    assert (pixels(images) == 255).all()
    expected = samplers.generate(latent_student, samplers.mix, torch.tensor([0, 1]), 2, shape=(4, 4, 4), rows=[0, 1])
    assert torch.equal(seen[0], expected)
    with pytest.raises(NonFiniteError):
        latent_student.generate(0, decoder=lambda x: x[:, :1] * torch.nan)


def test_points_are_returned_as_a_tensor():
    """Samples have the dtype of the network, with labels or without a condition."""
    assert MLP(2).generate(rows=range(5)).shape == (5, 2)
    points = MLP(2, num_classes=3).double().generate()
    assert points.shape == (3, 2)
    assert points.dtype == torch.float64
    with pytest.raises(ValueError, match=r"MLP.*condition.*3"):
        MLP(2).generate(3)
    with pytest.raises(ValueError, match="at least 1: got 0 rows"):
        MLP(2).generate(rows=[])


def test_a_network_that_ignores_the_end_time_is_sampled_by_50_euler_steps():
    """A velocity field uses 50 steps of euler; a flow map uses 2 steps of mix, or 50 if euler is requested."""
    calls = []
    for end_time, options in ((False, {}), (True, {}), (True, {"sampler": "euler"}), (False, {"sampler": "mix"})):
        network = DiT(in_channels=1, num_classes=2, end_time=end_time, **TINY)
        times = []
        network.t_embedder.register_forward_pre_hook(lambda _, arguments, times=times: times.append(arguments[0][0]))
        network.generate(0, **options)
        calls.append(len(times))
    assert calls == [50, 2, 50, 2]


def test_captions_go_through_the_encoder_that_the_config_names():
    """The stored emoji student names MiniLM. Equal captions are encoded once, and rows stay in order."""
    network = load(WEIGHTS / "emoji/student")
    images = network.generate(["red heart", "dog", "red heart"], rows=[0, 1, 0])
    assert [image.mode for image in images] == ["RGB"] * 3
    assert np.array_equal(pixels(images)[0], pixels(images)[2])
    assert not np.array_equal(pixels(images)[0], pixels(images)[1])
    latents = samplers.generate(network, samplers.mix, MiniLM()(["dog"]), 2, shape=(8, 8, 8), rows=[4], seed=1)
    expected = network.recorded_coder.decode(latents)
    found = network.generate("dog", seed=1, rows=[4], encoder="minilm")
    assert torch.equal(torch.from_numpy(pixels(found)), to_uint8(expected).permute(0, 2, 3, 1))


def test_captions_without_a_known_encoder_need_one():
    """Encoded captions need no encoder, and a single caption is used for all rows."""
    network = TextDiT(in_channels=1, caption_width=6, end_time=True, **TINY)
    with pytest.raises(ValueError, match=r"text_encoder.*encoder="):
        network.generate("dog")
    captions = Captions(torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    assert len(network.generate(captions, rows=range(3))) == 3


def test_students_of_a_pipeline_use_its_text_encoders(tmp_path):
    """Samples of a LoRA student of a tiny bfloat16 SD3 are in float32, the dtype of its adapters."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from decm_lightning.teachers import DiffusersTeacher
    from tests.teachers.pipelines import sd3

    sd3(layers=2).save_pretrained(tmp_path)
    network = DiffusersTeacher(str(tmp_path), dtype="bfloat16").network.with_end_time(2)
    seen = []
    (image,) = network.generate("a dog", decoder=lambda x: seen.append(x) or x[:, :3])
    assert image.size == (4, 4)
    assert seen[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("condition", "options", "message"),
    [
        ([10, 11, -1], {}, r"0 to 10.*\[11, -1\]"),
        (torch.tensor(0.5), {}, "integers.*float32"),
        (torch.tensor([[1]]), {}, r"integers.*\(1, 1\)"),
        ([], {}, "0 rows and 0 "),
        ([1, 2], {"rows": [1]}, "1 rows and 2 "),
        ("three", {}, "captions"),
        (3, {"encoder": "minilm"}, "captions"),
        (3, {"steps": 0}, "steps.*0"),
        (3, {"seed": -1}, "seed.*-1"),
        (3, {"sampler": "heun"}, "heun"),
        (3, {"sampler": "mix", "s2": 0.5}, "s2.*s1"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(condition, options, message, student):
    with pytest.raises(ValueError, match=message):
        student.generate(condition, **options)


@pytest.mark.parametrize("condition", [None, 3, [], ["dog", 3]])
def test_a_network_of_captions_refuses_anything_else(condition):
    with pytest.raises(ValueError, match=r"TextDiT.*captions: got"):
        TextDiT(in_channels=1, caption_width=6, end_time=True, **TINY).generate(condition)
