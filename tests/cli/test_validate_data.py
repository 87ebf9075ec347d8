"""decm validate-data on good and bad folders, and decm fit on latents."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decm_lightning import cli
from decm_lightning.data.shards import Provenance, checksum
from tests.data.test_shards import change, write_shards

ROOT = Path(__file__).parents[2]
SHARD = "latents_rank00_shard001.safetensors"


@pytest.fixture
def decm(monkeypatch, tmp_path, capsys):
    """A function that runs one command in an empty folder with latents in `latents`: (exit code, out, err)."""
    (tmp_path / "latents").mkdir()
    write_shards(tmp_path / "latents", (2000, 4))
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler keeps the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def poison(folder):
    """Make one latent infinite that the check before training leaves out."""
    tensors = load_file(folder / SHARD)
    tensors["latents_flip"][3, 1, 2, 3] = torch.inf
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SHARD)


def record_shards(folder):
    """Write a record with the checksum of every shard, one of which changes afterwards."""
    checksums = {file.name: checksum(file) for file in folder.glob("*.safetensors")}
    scaling = {"latent_norm": True, "latent_multiplier": 1.0}
    Provenance("a VAE", scaling, [2, 4, 4], 2004, 10, checksums).write(folder)
    change(folder, labels=torch.zeros(4).long())


def fit(*argv):
    """Return the command that trains a tiny teacher on the latents."""
    network = {
        "input_size": 4,
        "in_channels": 2,
        "patch_size": 2,
        "width": 8,
        "depth": 1,
        "heads": 1,
        "num_classes": 10,
    }
    model = {"network": {"class_path": "decm_lightning.networks.DiT", "init_args": network}}
    data = {"folder": "latents", "batch_size": 8, "num_classes": 10}
    return [
        *("fit", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"),
        *("--model", json.dumps({"class_path": "decm_lightning.TeacherTraining", "init_args": model})),
        *("--data", json.dumps({"class_path": "decm_lightning.data.ImageNetLatents", "init_args": data})),
        *argv,
    ]


def test_a_sound_folder_is_described(decm):
    code, out, _ = decm("validate-data", "latents", "--num_classes", "10", "--channels", "2", "--size", "4")
    assert code == 0
    table = dict(line.split(maxsplit=1) for line in out.splitlines() if "%" not in line and line)
    assert table["shards"] == "2"
    assert table["images"] == "2004, each plain and mirrored"
    assert table["classes"] == "10 of 10 present"
    assert table["shape"] == "2 x 4 x 4"
    assert abs(float(table["mean"].split()[0])) < 1e-3
    assert table["std"] == "1.0000 after scaling"
    assert table["VAE"] == "a VAE"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no folder nowhere: expected one of safetensors shards"),
        (["."], "no *.safetensors file in .: expected shards"),
        (["latents", "--num_classes", "9"], "shard000.safetensors: row 9 of labels is 9: expected from 0 to 8"),
        (["latents", "--num_classes", "12"], "cache.json says that num_classes is 10: got 12"),
        (["latents", "--num_classes", "ten"], "num_classes: "),
        (["latents", "--channels", "4"], "latents of latents are 2 x 4 x 4: expected 4 x any x any"),
        (["latents", "--size", "8"], "latents of latents are 2 x 4 x 4: expected any x 8 x 8"),
        (["latents", "--latent_norm", "false"], "cache.json says that scaling is"),
        ([], "folder"),
    ],
)
def test_a_wrong_request_gives_one_clear_line_and_exit_code_2(argv, message, decm):
    refused(decm, ["validate-data", *argv], message)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (poison, f"{SHARD}: row 3 of latents_flip is NaN or infinite"),
        (
            lambda folder: change(folder, labels=torch.tensor([0, 1, 2, 10])),
            "row 3 of labels is 10: expected from 0 to 9",
        ),
        (lambda folder: change(folder, labels=None), f"{SHARD} lacks labels"),
        (lambda folder: (folder / SHARD).unlink(), "cache.json says that num_images is 2004: got 2000"),
        (lambda folder: (folder / "latents_stats.pt").unlink(), "no file latents/latents_stats.pt"),
        (
            lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-8]),
            "is no whole safetensors file",
        ),
        (record_shards, f"{SHARD} is not the one that cache.json names"),
    ],
)
def test_a_spoilt_folder_gives_one_clear_line_and_exit_code_2(spoil, message, decm):
    spoil(Path("latents"))
    refused(decm, ["validate-data", "latents"], message)


def test_unnormalised_latents_are_refused_before_training(decm):
    Path("latents/cache.json").unlink()
    refused(decm, fit("--data.init_args.latent_norm", "false"), "set latent_norm to true, or latent_multiplier to 0.2")


def test_latents_of_another_size_are_refused_before_training(decm):
    argv = fit("--model.init_args.network.init_args.in_channels", "4")
    refused(decm, argv, "latents of latents are (2, 4, 4): the network makes (4, 4, 4)")


def test_a_teacher_trains_on_latents(decm):
    assert decm(*fit())[0] == 0


def refused(decm, argv, message):
    """Check that a command ends with one line that has the message."""
    code, _, err = decm(*argv)
    lines = [line for line in err.splitlines() if line.startswith("decm: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
