"""Every config in configs/ parses and builds what it names."""

import struct
import sys
from pathlib import Path

import pytest
import yaml

from decm_lightning import cli

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def tiny_idx(tmp_path):
    """A folder of IDX files of 300 + 40 grey images, 28 x 28."""
    for part, count in (("train", 300), ("t10k", 40)):
        images = bytes(i % 256 for i in range(count * 28 * 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + images)
        labels = bytes(i % 10 for i in range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)
    return tmp_path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_trains_a_step(config, tiny_idx, monkeypatch):
    argv = ["decm", "fit", "--config", str(config), "--trainer.max_steps", "1"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    argv += ["--data.init_args.batch_size", "16", "--trainer.limit_val_batches", "0"]
    content = yaml.safe_load(config.read_text())
    if "folder" in content["data"]["init_args"]:
        argv += ["--data.init_args.folder", str(tiny_idx)]
    # A learning-rate monitor, which a run without a logger refuses, is no part of what is tested here.
    callbacks = [c for c in content["trainer"].get("callbacks", []) if "LearningRateMonitor" not in c["class_path"]]
    argv += ["--trainer.callbacks", yaml.safe_dump(callbacks, default_flow_style=True, width=10**6).strip()]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*argv, "--trainer.default_root_dir", str(tiny_idx / "run")])
    assert cli.main() == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_is_headed_by_what_it_is_and_costs(config):
    head = [line for line in config.read_text().splitlines()[:12] if line.startswith("#")]
    assert len(head) >= 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_can_be_printed(config, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["decm", "fit", "--config", str(config), "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == yaml.safe_load(config.read_text())["model"]["class_path"]
