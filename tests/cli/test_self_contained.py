"""A trained student is sampled without options: from its checkpoint, its exported folder, and in Python."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from decm_lightning import cli
from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.networks import DiT, TextDiT, load, save
from tests.autoencoders.tiny import save_kl
from tests.data.latents.test_shards import write_shards

ROOT = Path(__file__).parents[2]
RUN = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "logger": False,
    },
    "model": {
        "class_path": "decm_lightning.Distiller",
        "init_args": {
            "teacher": {"class_path": "decm_lightning.teachers.PretrainedTeacher", "init_args": {"path": "teacher"}},
            "guidance": {"scale": 1.5, "interval": [0.1, 0.9]},
            "lr_scheduler": {"class_path": "decm_lightning.training.WarmupCosine", "init_args": {"warmup": 0}},
        },
    },
    "data": {"class_path": "decm_lightning.data.Digits", "init_args": {"batch_size": 16, "reference_size": 20}},
}
SPECS = ["student/mix/2", "student/mix/2?s1=0.3", "student/consistency/4", "student/mix/4"]
LAST = "checkpoints/last.ckpt"
SMALL = {"patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 10}


@pytest.fixture
def decm(monkeypatch, tmp_path, capsys):
    """A function that runs one command in an empty folder: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write(config, **changed):
    evaluation = {
        "class_path": "decm_lightning.evaluation.Evaluation",
        "init_args": {"features": "decm_lightning.demo.DigitsFeatures", "specs": SPECS, "samples": 20},
    }
    content = json.loads(json.dumps(RUN)) | changed
    content["trainer"] |= {
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "checkpoints"}
             | {"every_n_train_steps": 2, "save_last": True}},
        ] + ([] if changed else [evaluation])
    }  # fmt: skip
    Path(config).write_text(yaml.safe_dump(content))


def files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).glob("*.png")}


def randomized(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def same_images(decm, model, *argv):
    """Check that the images of the command from a checkpoint and from Python are equal, and return them."""
    out = f"images-{len(list(Path().glob('images-*')))}"
    code, _, err = decm("sample", model, "--per_class", "1", "--out", out, *argv)
    assert code == 0, err
    found = files(out)
    steps = int(argv[argv.index("--steps") + 1]) if "--steps" in argv else None
    images = load(model).generate(steps=steps)
    names = sorted(found)
    assert len(names) == len(images) > 1
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(Path(out) / name)), np.asarray(image))
    return found


def test_checkpoint_folder_and_python_generate_the_same_images(decm):
    save(randomized(DiT(8, 1, **SMALL)), "teacher")
    write("config.yaml")
    assert decm("fit", "--config", "config.yaml")[0] == 0
    record = load(LAST).record
    assert (record.teacher.name, record.teacher.identity) == ("teacher", load("teacher").identity())
    assert record.guidance == {"scale": 1.5, "limit": None, "interval": [0.1, 0.9]}
    assert "Lengths" in record.objective
    assert record.steps == 2
    assert record.data.name == "Digits"
    assert record.config["data"]["init_args"]["batch_size"] == 16
    before = same_images(decm, LAST)
    assert decm("test", "--config", "config.yaml", "--ckpt_path", LAST)[0] == 0
    table = json.loads(Path("checkpoints/last.quality.json").read_text())
    best = {
        steps: min((row for row in table["rows"] if row["steps"] == steps), key=lambda row: row["fd"])
        for steps in (2, 4)
    }
    expected = {steps: row["sampler"] + ("?s1=0.3" if "options" in row else "") for steps, row in best.items()}
    assert decm("export", LAST, "student")[0] == 0
    exported = json.loads(Path("student/record.json").read_text())
    assert exported["quality"] == table
    assert {steps: exported["sampling"][str(steps)] for steps in (2, 4)} == expected
    assert exported == load(LAST).record.as_dict()
    for steps in ([], ["--steps", "4"]):
        assert same_images(decm, LAST, *steps) == same_images(decm, "student", *steps)
    assert (same_images(decm, "student") == before) == (expected[2] == "mix")
    # The table of other weights is not used.
    Path("checkpoints/last.quality.json").write_text(json.dumps(table).replace(load(LAST).identity(), "0" * 16))
    assert load(LAST).record.quality is None


def test_a_teacher_records_its_data_and_is_sampled_by_euler(decm):
    network = {"class_path": "decm_lightning.networks.DiT", "init_args": {"input_size": 8, "in_channels": 1} | SMALL}
    model = {"class_path": "decm_lightning.TeacherTraining", "init_args": {"network": network, "class_dropout": 0.2}}
    write("config.yaml", model=model)
    assert decm("fit", "--config", "config.yaml")[0] == 0
    network = load(LAST)
    assert (network.record.teacher, network.record.guidance, network.record.data.name) == (None, None, "Digits")
    assert "class_dropout=0.2" in network.record.objective
    assert network.sampling() == ("euler", 50)
    assert same_images(decm, LAST, "--steps", "3")


@pytest.mark.parametrize("vae", ["vae", None])
def test_a_student_of_latents_decodes_them_without_options(vae, decm):
    """Without a VAE in the config, cache.json tells which VAE is accepted."""
    save(randomized(DiT(4, 2, patch_size=2, width=16, depth=1, heads=2, num_classes=10)), "teacher")
    save_kl(Path("vae"))
    save_kl(Path("other"), seed=1)
    Path("latents").mkdir()
    write_shards(Path("latents"), (30, 20))
    content = json.loads(Path("latents/cache.json").read_text())
    content["vae"] = load_autoencoder("vae").identity
    Path("latents/cache.json").write_text(json.dumps(content))
    data = {"folder": "latents", "batch_size": 10, "num_workers": 0, "num_classes": 10, "vae": vae}
    write("config.yaml", data={"class_path": "decm_lightning.data.ImageNetLatents", "init_args": data})
    assert decm("fit", "--config", "config.yaml")[0] == 0
    assert decm("export", LAST, "student")[0] == 0
    both = ("--per_class", "1", "--vae", "vae")
    assert decm("sample", LAST, *both, "--latents", "latents", "--out", "explicit")[0] == 0
    shutil.move("latents", "gone")
    expected = files("explicit")
    assert len(expected) == 10
    for model in (LAST, "student"):
        assert decm("sample", model, *both, "--out", f"vae-{model.split('/')[0]}")[0] == 0
        assert files(f"vae-{model.split('/')[0]}") == expected
        code, _, err = decm("sample", model, "--vae", "other", "--out", "refused")
        assert code == 2
        assert content["vae"] in err
        assert load_autoencoder("other").identity in err
        assert len(err.splitlines()) == 1
        if vae:
            assert same_images(decm, model) == expected
        else:
            assert content["vae"] in decm("sample", model, "--out", "refused")[2]
    shutil.move("vae", "moved")
    if vae:
        assert content["vae"] in decm("sample", "student", "--out", "refused")[2]
    assert decm("sample", "student", "--per_class", "1", "--vae", "moved", "--out", "moved-images")[0] == 0
    assert files("moved-images") == expected


def test_prompts_need_no_encoder_and_refuse_another(decm):
    Path("prompts.txt").write_text("red heart\nwinking face\n")
    student = str(ROOT / "weights/emoji/student")
    argv = ("sample-prompts", student, "--prompts", "prompts.txt", "--per_prompt", "2")
    assert decm(*argv, "--out", "images", "--steps", "4")[0] == 0
    for number, prompt in enumerate(("red heart", "winking face")):
        images = load(student).generate([prompt] * 2, rows=[number, 2 + number], steps=4)
        for k, image in enumerate(images):
            found = np.asarray(Image.open(f"images/{number:05d}/samples/{k:04d}.png"))
            assert np.array_equal(found, np.asarray(image))
    assert json.loads(Path("images/settings.json").read_text())["sampler"] == "consistency"
    code, _, err = decm(*argv, "--encoder", "minilm?max_tokens=16", "--out", "other")
    assert code == 2
    assert "minilm (" in err.splitlines()[-1]
    assert "minilm?max_tokens=16" in err.splitlines()[-1]


def test_pairs_record_the_text_encoder_and_the_vae(decm):
    """The VAE's config determines the scaling: z * 0.18215."""
    from decm_lightning.text import MiniLM

    Path("pairs").mkdir()
    lines = []
    for number in range(12):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(f"pairs/{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": f"red {number}"}))
    Path("pairs/metadata.jsonl").write_text("\n".join(lines))
    save_kl(Path("vae"))
    save(randomized(TextDiT(4, 2, caption_width=384, patch_size=2, width=16, depth=1, heads=2)), "teacher")
    data = {"source": "pairs", "size": 8, "vae": "vae", "batch_size": 4, "num_workers": 0, "cache": "cache"}
    write("config.yaml", data={"class_path": "decm_lightning.data.TextImagePairs", "init_args": data})
    assert decm("fit", "--config", "config.yaml")[0] == 0
    record = load(LAST).record
    assert (record.text_encoder.name, record.text_encoder.identity) == ("minilm", MiniLM().identity)
    assert (record.vae.name, record.vae.identity) == ("vae", load_autoencoder("vae").identity)
    assert record.latents == {"mean": [0.0], "std": [1.0], "multiplier": 0.18215, "has_statistics": False}
    assert record.data.name == "pairs"
    Path("prompts.txt").write_text("red 3\n")
    assert decm("sample-prompts", LAST, "--prompts", "prompts.txt", "--per_prompt", "2", "--out", "images")[0] == 0
    images = load(LAST).generate(["red 3"] * 2)
    found = [np.asarray(Image.open(f"images/00000/samples/{k:04d}.png")) for k in range(2)]
    assert np.array_equal(np.stack(found), np.stack([np.asarray(image) for image in images]))
    assert found[0].shape == (8, 8, 3)
