"""Every config in configs/ parses and builds its objects, also combined with every file of configs/trainer."""

import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
import yaml

from decm_lightning import cli
from decm_lightning.cli.trainer import build
from decm_lightning.demo import emoji
from decm_lightning.networks import load

ROOT = Path(__file__).parents[1]
OVERLAYS = sorted((ROOT / "configs/trainer").glob("*.yaml"))
# configs/compare has lists of runs, see tests/test_study.py.
STUDIES = set((ROOT / "configs/compare").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(OVERLAYS) - STUDIES)
EXPERIMENT = ROOT / "configs/digits/decm.yaml"
# The other configs need prepared files such as latents. Tests that create these files also train on them.
TRAINED = [config for config in CONFIGS if config.parent.name in ("digits", "fashion")]


@pytest.fixture
def tiny_idx(tmp_path):
    """A folder with IDX files of 300 + 40 grayscale images, 28 x 28."""
    for part, count in (("train", 300), ("t10k", 40)):
        images = bytes(i % 256 for i in range(count * 28 * 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images)
        labels = bytes(i % 10 for i in range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)
    return tmp_path


def train_a_step(config, folder, monkeypatch, *more):
    """Run the first training step of a config on the CPU, with 16 rows; return the exit code."""
    argv = ["decm", "fit", "--config", str(config), *more, "--trainer.max_steps", "1"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    argv += ["--data.init_args.batch_size", "16", "--trainer.limit_val_batches", "0"]
    content = yaml.safe_load(config.read_text())
    if "folder" in content["data"]["init_args"]:
        argv += ["--data.init_args.folder", str(folder)]
    # A learning-rate monitor fails without a logger and is not tested here.
    callbacks = [c for c in content["trainer"].get("callbacks", []) if "LearningRateMonitor" not in c["class_path"]]
    argv += ["--trainer.callbacks", yaml.safe_dump(callbacks, default_flow_style=True, width=10**6).strip()]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*argv, "--trainer.default_root_dir", str(folder / "run")])
    return cli.main()


@pytest.mark.parametrize("config", TRAINED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_trains_a_step(config, tiny_idx, monkeypatch):
    assert train_a_step(config, tiny_idx, monkeypatch) == 0


@pytest.mark.parametrize("name", ["teacher", "decm"])
def test_a_config_of_captions_trains_a_step(name, tmp_path, monkeypatch):
    """On 40 of the emoji, because encoding all captions takes a minute."""
    chosen = emoji.read_emoji()[:40]
    monkeypatch.setattr(emoji, "read_emoji", lambda: chosen)
    kept = ["--data.init_args.cache", str(tmp_path / "cache")]
    assert train_a_step(ROOT / f"configs/emoji/{name}.yaml", tmp_path, monkeypatch, *kept) == 0
    assert list((tmp_path / "cache").glob("captions-*.safetensors"))


def test_a_teacher_goes_on_from_kept_weights(monkeypatch):
    """As documented: `networks.load` in place of a network class."""
    monkeypatch.chdir(ROOT)
    kept = "weights/digits/teacher"
    network = json.dumps({"class_path": "decm_lightning.networks.load", "init_args": {"path": kept}})
    built = build("--config", "configs/digits/teacher.yaml", "--model.init_args.network", network)
    expected = load(kept).state_dict()
    for weights in (built.model.network, built.model.average):
        assert all(torch.equal(value, expected[name]) for name, value in weights.state_dict().items())
    assert all(parameter.requires_grad for parameter in built.model.network.blocks.parameters())
    assert all(module.training for module in built.model.network.modules())


# tests/parallel/test_overlays.py runs the configs for several processes.
@pytest.mark.parametrize("name", ["cpu", "gpu", "debug"])
def test_an_overlay_trains_a_step_of_an_experiment(name, tmp_path, monkeypatch):
    overlay = str(ROOT / f"configs/trainer/{name}.yaml")
    few = ["--trainer.accumulate_grad_batches", "2"] if name == "gpu" else []
    assert train_a_step(EXPERIMENT, tmp_path, monkeypatch, "--config", overlay, *few) == 0


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_what_an_overlay_says_is_what_is_built_and_all_else_stays(overlay, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Only the kind of device is not available here.
    built = build("--config", str(EXPERIMENT), "--config", str(overlay), "--trainer.accelerator", "cpu")
    actual, expected = built.config.as_dict(), yaml.safe_load(overlay.read_text())
    expected["trainer"].pop("accelerator", None)
    assert_within(expected, actual)
    assert actual["model"]["init_args"]["teacher"]["init_args"]["path"] == "weights/digits/teacher"
    assert actual["trainer"]["gradient_clip_val"] == 1.0
    strategy = expected["trainer"]["strategy"]
    assert strategy == "auto" or type(built.trainer.strategy).__name__ == strategy["class_path"].rpartition(".")[2]


def assert_within(expected, actual):
    """Check that every key and value of one tree is in another."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_within(value, actual[key])
        else:
            assert str(actual[key]) == str(value), key


@pytest.mark.parametrize("config", CONFIGS + OVERLAYS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_starts_with_a_description_and_its_cost(config):
    head = [line for line in config.read_text().splitlines()[:12] if line.startswith("#")]
    assert len(head) >= 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_has_the_length_of_its_run_once(config):
    """Schedule, average and noise edge depend on it, and intervals of the whole run refer to it."""
    text = re.sub("#.*", "", config.read_text())
    steps = yaml.safe_load(text)["trainer"]["max_steps"]
    lengths = re.findall(r"(\w*(?:steps|iters|T_max|interval)): (?:&steps )?(\d+)\b", text)
    assert [name for name, value in lengths if value == str(steps)] == ["max_steps"]
    assert not {name for name, _ in lengths} & {"total_steps", "total_iters", "T_max", "r_decay_steps"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_can_be_printed(config, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["decm", "fit", "--config", str(config), "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == yaml.safe_load(config.read_text())["model"]["class_path"]
