"""decm validate-data on good and bad folders, and decm fit on latents."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decm_lightning import cli
from decm_lightning.autoencoders import load_autoencoder
from decm_lightning.autoencoders.provenance import Provenance
from decm_lightning.files import file_sha256
from tests.autoencoders.tiny import save_kl
from tests.data.latents.test_shards import change, write_shards

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
    """Make a latent infinite that the check before training does not read."""
    tensors = load_file(folder / SHARD)
    tensors["latents_flip"][3, 1, 2, 3] = torch.inf
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SHARD)


def record_shards(folder):
    """Write a record with the checksum of every shard, one of which changes afterwards."""
    checksums = {file.name: file_sha256(file) for file in folder.glob("*.safetensors")}
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
    assert table["std"].startswith("1.0000 after scaling")
    assert table["VAE"] == "a VAE"
    assert "skipped" not in table


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "no folder at nowhere"),
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
            "1 error in latents (1 shard), the first: latents/latents_rank00_shard001.safetensors: cut short at",
        ),
        (record_shards, f"{SHARD} has changed since cache.json"),
    ],
)
def test_a_spoilt_folder_gives_one_clear_line_and_exit_code_2(spoil, message, decm):
    spoil(Path("latents"))
    refused(decm, ["validate-data", "latents"], message)


def test_all_errors_are_printed_and_counted(decm):
    """A shard that changed and has rows that are not finite, one that is cut short, labels and the record."""
    folder = Path("latents")
    record_shards(folder)
    x = torch.randn(4, 2, 4, 4)
    x[1] = torch.nan
    x[3, 0, 0, 0] = torch.inf
    change(folder, latents=x, labels=torch.tensor([0, 1, 12, 13]))
    (folder / "a.safetensors").write_bytes((folder / SHARD).read_bytes()[:-8])
    (folder / "b.safetensors").mkdir()
    code, out, err = decm("validate-data", "latents", "--num_classes", "10", "--size", "8")
    assert code == 2
    lines = [line for line in out.splitlines() if "safetensors" in line or "latents of" in line]
    for part in (
        "a.safetensors: cut short at",
        "b.safetensors: a folder instead of a file",
        "shard001.safetensors: row 2 of labels is 12: expected from 0 to 9 (1 more",
        "latents of latents are 2 x 4 x 4: expected any x 8 x 8",
        "shard001.safetensors has changed since cache.json",
        "shard001.safetensors: row 1 of latents is NaN or infinite",
        "shard001.safetensors: row 3 of latents is NaN or infinite",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 7
    assert "7 errors in latents (2 shards, 1 label file, 1 shape, 1 checksum, 2 non-finite rows), the first" in err


def test_of_many_rows_that_are_not_finite_ten_are_named_and_all_counted(decm):
    folder = Path("latents")
    x = torch.randn(2, 20, 2, 4, 4)
    x[0, 5:] = torch.inf
    x[1, 2] = torch.nan
    change(folder, labels=torch.zeros(20).long(), latents=x[0].clone(), latents_flip=x[1].clone())
    (folder / "cache.json").unlink()
    code, out, err = decm("validate-data", "latents")
    assert code == 2
    assert out.count(" is NaN or infinite") == 10
    assert f"{SHARD}: 15 rows of latents are NaN or infinite" in out
    assert f"{SHARD}: 1 rows of latents_flip are NaN or infinite" in out
    assert "16 errors in latents (16 non-finite rows), the first: " in err


def test_the_worst_channels_are_named(decm):
    """Against values computed from the rows themselves, of which one that is not finite is left out."""
    folder = Path("latents")
    poison(folder)
    torch.save(
        {"mean": torch.tensor([3.0, 1.5]).view(1, 2, 1, 1), "std": torch.tensor([4.0, 5.0]).view(1, 2, 1, 1)},
        folder / "latents_stats.pt",
    )
    (folder / "cache.json").unlink()
    code, out, _ = decm("validate-data", "latents")
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    rows = torch.cat([tensors[key] for tensors in files for key in ("latents", "latents_flip")])
    rows = rows[rows.isfinite().flatten(1).all(1)]
    x = (rows - torch.tensor([3.0, 1.5]).view(2, 1, 1)) / torch.tensor([4.0, 5.0]).view(2, 1, 1)
    std, mean = torch.std_mean(x, (0, 2, 3), correction=0)
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    table = [line.split() for line in out.splitlines()]
    for channel in (0, 1):
        (row,) = (cells for cells in table if cells[:1] == [str(channel)])
        expected = [float(values[channel]) for values in (mean, std, low, high)]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected, abs=1e-4)
    assert f"furthest from 0 in channel 1: {mean[1]:.4f}" in out
    assert f"furthest from 1 in channel 0: {std[0]:.4f}" in out
    assert code == 2


def test_strings_for_numbers_in_the_record_are_one_error(decm):
    file = Path("latents/cache.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_classes": "10"}))
    refused(decm, ["validate-data", "latents"], 'cache.json: num_classes must be an integer above 0: got "10"')


def test_nothing_usable_is_said(decm):
    for file in Path("latents").glob("*.safetensors"):
        file.write_bytes(b"")
    code, out, err = decm("validate-data", "latents")
    assert code == 2
    assert out.count("empty (0 bytes)") == 2
    assert "2 errors in latents (2 shards), the first: " in err


def test_the_vae_is_compared_and_tried(decm):
    save_kl(Path("vae"))
    save_kl(Path("other"), seed=1)
    save_kl(Path("wide"), latent_channels=4)
    content = json.loads(Path("latents/cache.json").read_text())
    content["vae"] = load_autoencoder("vae").identity
    Path("latents/cache.json").write_text(json.dumps(content))
    code, out, _ = decm("validate-data", "latents", "--vae", "vae")
    assert code == 0
    assert "3 x 8 x 8, from " in out
    for vae, message in (
        ("other", "encoded these latents, but"),
        ("wide", "the latents have 2 channels, but the VAE has 4"),
    ):
        code, out, err = decm("validate-data", "latents", "--vae", vae)
        assert code == 2
        assert message in out
        assert "VAE" in err
    refused(decm, ["validate-data", "latents", "--vae", "not/there/at/all"], "VAE not/there/at/all not found")


def test_skipped_files_are_counted(decm):
    Path("latents/._a.safetensors").write_bytes(b"x")
    Path("latents/b.safetensors.partial").write_bytes(b"x")
    code, out, _ = decm("validate-data", "latents")
    assert code == 0
    assert "skipped  1 hidden, 1 unfinished" in out


def test_unnormalised_latents_are_refused_before_training(decm):
    Path("latents/cache.json").unlink()
    refused(decm, fit("--data.init_args.latent_norm", "false"), "set latent_norm to true, or latent_multiplier to 0.2")


def test_latents_of_another_size_are_refused_before_training(decm):
    network = "--model.init_args.network.init_args"
    argv = fit(f"{network}.in_channels", "4", f"{network}.width", "16")
    refused(decm, argv, "latents of latents are (2, 4, 4) and the network's (4, 4, 4)")


def test_a_teacher_trains_on_latents(decm):
    assert decm(*fit())[0] == 0


def refused(decm, argv, message):
    """Check that a command ends with a one-line error that contains the message."""
    code, _, err = decm(*argv)
    lines = [line for line in err.splitlines() if line.startswith("decm: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
