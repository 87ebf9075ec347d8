"""A network's record: what is stored, which sampler it recommends, and which VAE and text encoder it accepts."""

import copy
import gc
import json
import pickle
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from decm_lightning.autoencoders import LatentCoder, LatentNormalization, load_autoencoder
from decm_lightning.image_writer import to_pil, to_uint8
from decm_lightning.networks import DiT, TextDiT, describe, load, save
from decm_lightning.networks.record import (
    FLOW_MAP_SAMPLING,
    WEIGHTS_HASH,
    Record,
    Reference,
    choose,
    measured_sampling,
    quality_file,
    recommended,
)
from decm_lightning.samplers import consistency, euler, generate, mix
from decm_lightning.teachers import PretrainedTeacher
from decm_lightning.text import MiniLM
from tests.autoencoders.tiny import save_kl

TINY = {"input_size": 4, "patch_size": 2, "width": 16, "depth": 1, "heads": 2}
ROOT = Path(__file__).parents[2]
FULL = Record(
    teacher=Reference("weights/teacher", "0123456789abcdef", "apache-2.0"),
    guidance={"scale": 2.5, "limit": None, "interval": [0.0, 0.7]},
    objective="Objective(...)",
    steps=600,
    class_names=("cat", "dog"),
    text_encoder=Reference("minilm?max_tokens=64", "f" * 64),
    vae=Reference("vae", "AutoencoderKL 0123456789abcdef"),
    latents=LatentNormalization(torch.tensor([0.1, 1 / 3]).view(1, 2, 1, 1), torch.ones(1, 2, 1, 1), 1.5).as_json(),
    sampling={1: "mix", 2: "mix?s1=0.6"},
    quality={"rows": [{"model": "student", "fd": 0.3}]},
    data=Reference("Digits", "0123"),
    config={"data": {"class_path": "decm_lightning.data.Digits"}},
)


@pytest.fixture
def network():
    """A student with random weights."""
    return student(1)


def student(channels, seed=0, **options):
    torch.manual_seed(seed)
    network = DiT(in_channels=channels, **({"num_classes": 3, "end_time": True} | TINY | options))
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def pixels(images):
    return [np.asarray(image).tobytes() for image in images]


def test_a_record_is_the_same_after_json():
    assert Record.from_dict(json.loads(json.dumps(FULL.as_dict()))) == FULL
    assert Record.from_dict(Record().as_dict()) == Record() == Record.from_dict({})
    normalization = LatentNormalization.from_json(FULL.as_dict()["latents"])
    assert torch.equal(normalization.mean.flatten(), torch.tensor([0.1, 1 / 3]))
    assert (normalization.multiplier, normalization.has_statistics) == (1.5, True)


def test_a_folder_stores_the_record_and_loses_that_of_the_previous_network(network, tmp_path):
    network.record = FULL
    save(network, tmp_path / "one")
    assert load(tmp_path / "one").record == FULL
    network.save_pretrained(tmp_path / "hub")
    assert load(tmp_path / "hub").record == FULL
    network.record = None
    save(network, tmp_path / "one")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    assert load(tmp_path / "one").record is None


def test_a_checkpoint_stores_the_record_and_the_config(network, tmp_path):
    """Older checkpoints without a record still load."""
    state = {f"average.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {"network": describe(network), "state_dict": state, "config": "data: {class_path: decm_lightning.data.X}"}
    torch.save(content, tmp_path / "old.ckpt")
    assert load(tmp_path / "old.ckpt").record is None
    torch.save(content | {"record": replace(FULL, config=None).as_dict()}, tmp_path / "new.ckpt")
    assert load(tmp_path / "new.ckpt").record == replace(FULL, config={"data": {"class_path": "decm_lightning.data.X"}})


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "Expecting"),
        ("[1]", "dict"),
        ('{"sampling": {"two": "mix"}}', "two"),
        ('{"sampling": {"0": "mix"}}', "0"),
        ('{"sampling": {"2": "os.system"}}', "os.system"),
        ('{"stuff": 1}', "stuff"),
        ('{"vae": {"name": "x"}}', "identity"),
    ],
)
def test_a_damaged_record_is_one_line_and_runs_no_code(content, cause, network, tmp_path):
    save(network, tmp_path)
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=rf"record\.json cannot be loaded: .*{cause}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def row(sampler, steps, fd, model="student", **more):
    return {"model": model, "sampler": sampler, "steps": steps, "fd": fd, "kid": -fd, **more}


ROWS = [
    row("euler", 2, 0.1, model="teacher"),
    row("mix", 2, 0.3),
    row("mix", 2, 0.2, options={"s1": 0.6}),
    row("consistency", 2, 0.25),
    row("mix", 4, float("nan")),
    row("consistency", 4, 0.5, options={"times": [0.7, 0.8, 0.9]}),
    row("my_module.heun", 4, 0.1),
]


def test_the_measured_sampler_of_each_number_of_steps_has_the_smallest_distance():
    assert measured_sampling({"rows": ROWS}) == {2: "mix?s1=0.6", 4: "consistency?times=[0.7,0.8,0.9]"}
    teacher = [row("euler", steps, 1.0, model="teacher") for steps in (8, 50)]
    assert measured_sampling({"rows": teacher}) == {8: "euler", 50: "euler"}
    inception = [row("mix", 1, 1.0, fid=9.0), row("euler", 1, 2.0, fid=8.0)]
    assert measured_sampling({"rows": inception}) == {1: "euler"}


def test_other_numbers_of_steps_have_the_sampler_of_the_nearest():
    """The defaults are mix up to 2 steps, consistency from 3 to 19, and euler from 21. Times are left out."""
    found = {steps: recommended(FLOW_MAP_SAMPLING, steps) for steps in (1, 2, 3, 8, 19, 21, 100)}
    names = ["mix", "mix", "consistency", "consistency", "consistency", "euler", "euler"]
    assert list(found.values()) == names
    sampling = measured_sampling({"rows": ROWS})
    assert recommended(sampling, 4) == "consistency?times=[0.7,0.8,0.9]"
    assert recommended(sampling, 5) == "consistency"
    assert recommended(sampling, 1) == "mix?s1=0.6"


@pytest.mark.parametrize(
    ("reads_end_time", "sampling", "requested", "expected"),
    [
        (True, {}, (None, None), ("mix", 2)),
        (False, {}, (None, None), ("euler", 50)),
        (False, {}, (None, 4), ("euler", 4)),
        (True, {4: "consistency"}, (None, None), ("consistency", 4)),
        (False, {8: "euler", 50: "euler"}, (None, None), ("euler", 50)),
        (True, {}, ("euler?shift=3", None), ("euler?shift=3", 50)),
        (True, {}, ("consistency", None), ("consistency", 2)),
        (True, {}, (mix, 3), (mix, 3)),
    ],
)
def test_sampler_and_steps_are_recommended_unless_they_are_requested(reads_end_time, sampling, requested, expected):
    assert choose(Record(sampling=sampling), reads_end_time, *requested) == expected


def test_a_table_of_the_same_weights_becomes_part_of_the_record(network, tmp_path, caplog):
    """A table of other weights, or damaged, is named and left out, because the network is complete without it."""
    save(network, tmp_path / "student")
    file = quality_file(tmp_path / "student")
    table = {"protocol": {WEIGHTS_HASH: network.identity()}, "rows": ROWS}
    file.write_text(json.dumps(table))
    record = load(tmp_path / "student").record
    assert record.sampling == FLOW_MAP_SAMPLING | measured_sampling(table)
    assert record.quality["protocol"] == table["protocol"]
    assert not caplog.messages
    for content in (json.dumps(table).replace(network.identity(), "0" * 16), "{", '{"rows": []}', "3"):
        caplog.clear()
        file.write_text(content)
        assert load(tmp_path / "student").record is None
        assert str(file) in caplog.text
    assert quality_file(tmp_path / "a/last.ckpt") == tmp_path / "a/last.quality.json"


def test_generate_uses_the_recommended_sampler(network):
    network.record = Record(sampling={2: "consistency?times=[0.4]", 4: "mix"})
    labels = torch.arange(3)
    expected = generate(network, consistency, labels, 2, shape=(1, 4, 4), rows=range(3))
    assert pixels(network.generate(sampler="consistency", steps=2)) == pixels(map(to_pil, to_uint8(expected)))
    assert pixels(network.generate()) == pixels(network.generate(sampler="consistency", steps=2, times=[0.4]))
    assert pixels(network.generate()) != pixels(network.generate(sampler="consistency", steps=2))


@pytest.fixture
def latent(tmp_path):
    """A student of latents, with its VAE in `vae` and their normalization in the record."""
    network = student(2)
    coder = LatentCoder(
        load_autoencoder(save_kl(tmp_path / "vae")),
        LatentNormalization(torch.tensor([0.5, -0.5]).view(1, 2, 1, 1), torch.tensor([2.0, 0.1]).view(1, 2, 1, 1), 1.0),
    )
    vae = Reference(str(tmp_path / "vae"), coder.autoencoder.identity)
    network.record = Record(vae=vae, latents=coder.normalization.as_json())
    return network, coder


def test_latents_are_decoded_by_the_recorded_vae(latent, tmp_path):
    network, coder = latent
    save(network, tmp_path / "student")
    found = load(tmp_path / "student").generate([0, 1])
    samples = generate(network, mix, torch.tensor([0, 1]), 2, shape=(2, 4, 4), rows=[0, 1])
    assert pixels(found) == pixels(map(to_pil, to_uint8(coder.decode(samples))))
    assert found[0].size == (8, 8)
    assert pixels(network.generate([0, 1], decoder=lambda x: x[:, :1])) != pixels(found)
    # Without statistics, the config of the VAE determines the scaling.
    network = load(tmp_path / "student")
    network.record = replace(network.record, latents=None)
    plain = LatentCoder(coder.autoencoder).decode(samples)
    assert pixels(network.generate([0, 1])) == pixels(map(to_pil, to_uint8(plain)))


def test_another_vae_is_refused_by_its_hash_and_a_missing_one_is_named(latent, tmp_path):
    network, coder = latent
    shutil.move(tmp_path / "vae", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/vae \({coder.autoencoder.identity}\)"):
        network.generate()
    other = load_autoencoder(save_kl(tmp_path / "vae", seed=1)).identity
    with pytest.raises(ValueError, match=rf"VAE {tmp_path}/vae \({coder.autoencoder.identity}\).*\({other}\)"):
        network.generate()
    network.record = replace(network.record, vae=Reference("", coder.autoencoder.identity))
    with pytest.raises(ValueError, match=coder.autoencoder.identity):
        network.generate()


def test_a_student_and_its_vae_can_move_together(latent, tmp_path):
    """A VAE of the same name next to the network is used only if the recorded path is gone, and only if it is equal."""
    network, _ = latent
    save(network, tmp_path / "student")
    expected = pixels(load(tmp_path / "student").generate())
    (tmp_path / "moved").mkdir()
    for folder in ("student", "vae"):
        shutil.move(tmp_path / folder, tmp_path / "moved" / folder)
    assert pixels(load(tmp_path / "moved/student").generate()) == expected
    save_kl(tmp_path / "moved/vae", seed=1)
    with pytest.raises(ValueError, match="moved/vae is another one"):
        load(tmp_path / "moved/student").generate()


def test_another_text_encoder_is_refused_by_its_hash(tmp_path):
    """The same encoder at another place is accepted."""
    network = load(ROOT / "weights/emoji/student")
    own = network.record.text_encoder.identity
    assert own == MiniLM().identity
    shutil.copytree(MiniLM().folder, tmp_path / "copy")
    other = MiniLM(max_tokens=16)
    with pytest.raises(ValueError, match=rf"minilm \({own[:16]}\).*max_tokens=16.*\({other.identity[:16]}\)"):
        network.generate("dog", encoder=other)
    with pytest.raises(ValueError, match=r"minilm\?max_tokens=16"):
        network.generate("dog", encoder="minilm?max_tokens=16")
    network.record = replace(network.record, text_encoder=Reference(str(tmp_path / "copy"), "0" * 64))
    with pytest.raises(ValueError, match=str(tmp_path / "copy")):
        network.caption_encoder("minilm")


def test_the_text_encoder_is_loaded_once_and_freed_with_the_network(monkeypatch):
    """No copy of the network and no file contains it, nor the VAE."""
    network = load(ROOT / "weights/emoji/student")
    names, size = set(network.state_dict()), len(pickle.dumps(network))
    devices, move = [], MiniLM.to
    monkeypatch.setattr(MiniLM, "to", lambda self, device: (devices.append(device), move(self, device)))
    network.generate("dog", steps=1)
    encoder = network.caption_encoder().loaded[0]
    network.generate("cat", steps=1)
    assert network.caption_encoder().loaded[0] is encoder
    assert network.caption_encoder("minilm") is network.caption_encoder("minilm")
    assert devices == [torch.device("cpu")] * 2
    assert set(network.state_dict()) == names
    assert len(pickle.dumps(network)) < size + 1000
    copied = copy.deepcopy(network)
    assert not copied.encoders
    assert copied.recorded_coder is not network.recorded_coder
    freed = weakref.ref(encoder)
    del network, encoder
    gc.collect()
    assert freed() is None


def test_the_recorded_options_of_an_encoder_are_used():
    network = TextDiT(in_channels=1, caption_width=384, end_time=True, **TINY)
    trained = MiniLM(max_tokens=3)
    network.record = Record(text_encoder=Reference(trained.name, trained.identity))
    assert network.caption_encoder().max_tokens == 3
    with pytest.raises(ValueError, match="tokens"):
        network.caption_encoder("minilm?tokens=3")


def predicting_noise():
    """Return a DiT whose output is about its input: on pure noise, that is a prediction of noise."""
    network = DiT(in_channels=3, num_classes=3, prediction="noise", **TINY | {"width": 24})
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    for number in range(12):
        channel, rest = divmod(number, 4)
        network.x_embedder.proj.weight.data[number, channel, rest // 2, rest % 2] = 1
        network.x_embedder.proj.weight.data[12 + number, channel, rest // 2, rest % 2] = -1
        network.final_layer.linear.weight.data[rest * 3 + channel, number] = 1
    torch.nn.init.ones_(network.final_layer.norm_final.weight)
    return network.eval()


@pytest.mark.parametrize("form", ["folder", "public file"])
def test_a_network_that_predicts_noise_is_sampled_by_its_velocity(form, tmp_path):
    """Its folder says so. A public file does not, and the weights show it."""
    network, path = predicting_noise(), tmp_path / "DiT.pt"
    if form == "folder":
        path = tmp_path / "folder"
        save(network, path)
        assert load(path).prediction == "noise"
    else:
        torch.save(network.state_dict(), path)
        assert load(path, heads=2).prediction is None
    teacher = PretrainedTeacher(str(path), heads=2)
    assert teacher.prediction == teacher.network.prediction == "noise"
    labels = torch.arange(3)
    expected = generate(
        lambda x_t, t, s, condition: teacher(x_t, t, condition), euler, labels, 5, shape=(3, 4, 4), rows=range(3)
    )
    loaded = load(path, heads=2)
    assert pixels(loaded.generate(steps=5)) == pixels(map(to_pil, to_uint8(expected)))
    wrong = generate(loaded, euler, labels, 5, shape=(3, 4, 4), rows=range(3))
    assert (to_uint8(wrong).int() - to_uint8(expected).int()).abs().max() > 1


def test_a_lora_student_without_its_base_is_one_line(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from decm_lightning.teachers import DiffusersTeacher
    from tests.teachers.pipelines import sd3

    sd3(layers=2).save_pretrained(tmp_path / "base")
    network = DiffusersTeacher(str(tmp_path / "base")).network.with_end_time(2)
    save(network, tmp_path / "student")
    assert load(tmp_path / "student").reads_end_time
    shutil.rmtree(tmp_path / "base")
    expected = rf"{tmp_path}/student is a LoRA student of {tmp_path}/base with the weights {network.config['base']}"
    with pytest.raises(FileNotFoundError, match=expected) as error:
        load(tmp_path / "student")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["digits", "fashion", "emoji"])
def test_the_stored_students_have_records(name):
    record = load(ROOT / "weights" / name / "student").record
    assert record.teacher.identity == load(ROOT / "weights" / name / "teacher").identity()
    assert record.sampling == FLOW_MAP_SAMPLING | measured_sampling(record.quality)
    assert record.config["data"]["class_path"].startswith("decm_lightning.")
    assert record.steps > 0


def test_a_pipeline_folder_is_a_text_encoder_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    network = TextDiT(in_channels=1, caption_width=6, end_time=True, **TINY)
    encoder = network.caption_encoder(f"{tmp_path}?max_tokens=7&dtype=bfloat16")
    assert (encoder.model, encoder.requested_tokens, encoder.dtype) == (str(tmp_path), 7, "bfloat16")
    assert encoder.name == f"{tmp_path}?max_tokens=7&dtype=bfloat16"
