"""The ImageNet configs on tiny files in the real formats, and the rehearsal without ImageNet."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from benchmarks import rehearsal
from decm_lightning import cli
from decm_lightning.metrics.inception_network import Inception
from decm_lightning.networks import DiT

ROOT = Path(__file__).parents[1]


def decm(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["decm", *argv])
    return cli.main()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write the files that the configs name into `data/` of the working directory, small but in the real formats."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/imagenet256-latents").mkdir(parents=True)
    torch.manual_seed(0)
    teacher = DiT(16, 32, patch_size=1, width=32, depth=1, heads=2, num_classes=1000)
    torch.save({"ema": teacher.state_dict()}, "data/lightningdit-xl-imagenet256-800ep.pt")
    latents = torch.randn(1100, 32, 16, 16)
    shard = {"latents": latents, "latents_flip": latents.flip(-1), "labels": torch.arange(1100) % 1000}
    save_file(
        {name: part.contiguous() for name, part in shard.items()},
        "data/imagenet256-latents/latents_rank00_shard000.safetensors",
    )
    stats = {"mean": torch.zeros(1, 32, 1, 1), "std": torch.ones(1, 32, 1, 1)}
    torch.save(stats, "data/imagenet256-latents/latents_stats.pt")
    torch.save(Inception().state_dict(), "data/weights-inception-2015-12-05-6726825d.pth")
    np.savez("data/VIRTUAL_imagenet256_labeled.npz", arr_0=np.zeros((4, 256, 256, 3), np.uint8))
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 5,
        up_block_types=["UpDecoderBlock2D"] * 5,
        block_out_channels=[4] * 5,
        latent_channels=32,
        layers_per_block=1,
        norm_num_groups=2,
    )
    vae.save_pretrained("data/vae")
    return tmp_path


@pytest.mark.parametrize("name", ["imagenet", "imagenet-whole-triangle"])
def test_an_imagenet_config_trains_a_step(name, files, monkeypatch):
    """Teacher, latents, VAE, Inception and reference are read from files, and the student trains for one step."""
    options = {
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.limit_val_batches": 0,
    }
    options |= {
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "model.init_args.compile": "false",
    }
    options |= {"data.init_args.batch_size": 8, "data.init_args.num_workers": 0, "data.init_args.vae": "data/vae"}
    argv = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert decm(monkeypatch, "fit", "--config", str(ROOT / f"configs/{name}.yaml"), *argv) == 0
    folder = next((files / "runs").glob("*/version_0"))
    assert (folder / "config.yaml").is_file()


@pytest.mark.slow
def test_decm_test_scores_what_an_imagenet_config_trained(files, monkeypatch):
    """The evaluation of the config fills all columns from latents, VAE, Inception and references, for six samples."""
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    np.savez("data/VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    text = (ROOT / "configs/imagenet.yaml").read_text()
    short = {r"samples: \d+": "samples: 6", r"test_specs: \[.*\]": "test_specs: [student/mix/1]"}
    short |= {r"vae: .*": "vae: data/vae", r"every_n_train_steps: \d+": "every_n_train_steps: 1"}
    short |= {
        "compile: true": "compile: false",
        r"batch_size: \d+": "batch_size: 4",
        "num_workers: 8": "num_workers: 0",
    }
    for pattern, replacement in short.items():
        text = re.sub(pattern, replacement, text)
    Path("short.yaml").write_text(text)
    argv = ["--config", "short.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    argv += ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "1"]
    assert decm(monkeypatch, "fit", *argv, "--trainer.limit_val_batches", "0") == 0
    checkpoint = "runs/imagenet/version_0/checkpoints/last.ckpt"
    assert decm(monkeypatch, "test", *argv, "--ckpt_path", checkpoint) == 0
    table = Path(checkpoint).with_name("last.quality.md").read_text()
    assert "| fid | sfid | inception_score | precision | recall | kid |" in table
    assert "- labels: uniform over 1000 classes" in table
    assert "- real images: 6" in table


@pytest.mark.parametrize("name", ["imagenet", "imagenet-whole-triangle"])
def test_steps_and_batches_are_the_epochs_that_the_config_says(name):
    """250 epochs of 1,281,167 images, on eight devices."""
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    rows = 8 * config["data"]["init_args"]["batch_size"]
    assert rows == 1024
    assert config["trainer"]["max_steps"] * rows / 1_281_167 == pytest.approx(250, rel=1e-3)


SHORT = {r"(max_steps: (&steps )?)\d+": r"\g<1>2"}
SHORT |= {r"every_n_train_steps: \d+": "every_n_train_steps: 1", r"samples: \d+": "samples: 12"}
SHORT |= {r"val_check_interval: \d+": "val_check_interval: 2", r"euler/20": "euler/2"}


@pytest.mark.slow
def test_the_rehearsal_runs_every_command_of_the_real_thing(tmp_path, monkeypatch):
    """Run the commands of `make imagenet-rehearsal` in order, with shortened configs."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "configs/rehearsal").mkdir(parents=True)
    for config in (ROOT / "configs/rehearsal").glob("*.yaml"):
        text = config.read_text()
        for pattern, replacement in SHORT.items():
            text = re.sub(pattern, replacement, text)
        (tmp_path / "configs/rehearsal" / config.name).write_text(text)
    monkeypatch.chdir(tmp_path)
    rehearsal.images(Path("runs/rehearsal/images"))
    recipe = re.search(r"^imagenet-rehearsal:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines = recipe.group(1).replace("\\\n", " ").replace("$(REHEARSAL)", "runs/rehearsal").splitlines()
    commands = [line.strip().removeprefix("$(BIN)/decm ") for line in lines if line.strip().startswith("$(BIN)/decm ")]
    assert [command.split()[0] for command in commands] == ["encode", "validate-data", "fit", "fit", "test", "sample"]
    for command in commands:
        assert decm(monkeypatch, *shlex.split(command)) == 0, command
    table = Path("runs/rehearsal/student/checkpoints/last.quality.md").read_text()
    assert table.count("student") >= 3
    assert Path("runs/rehearsal/student/checkpoints/last.samples.png").is_file()
    assert Path("runs/rehearsal/student-2-steps.png").is_file()
