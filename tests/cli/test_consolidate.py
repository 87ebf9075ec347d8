"""Sharded checkpoints: consolidated, used directly, or refused with a one-line error."""

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from decm_lightning import cli
from decm_lightning.networks import DiT, save
from decm_lightning.networks.sharded import read_whole

ROOT = Path(__file__).parents[2]
SMALL = {"input_size": 8, "in_channels": 1, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 10}
FIT = [
    *("--config", str(ROOT / "configs/digits/decm.yaml"), "--config", str(ROOT / "configs/trainer/cpu.yaml")),
    *("--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--data.init_args.batch_size", "16"),
    *("--model.init_args.teacher.init_args.path", "teacher"),
]
SAVING = (
    "[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
    "init_args: {dirpath: '.', filename: '{step}', every_n_train_steps: 2}}]"
)


def in_shards(file: Path, folder: Path) -> None:
    """Write an ordinary checkpoint as a single process under ModelParallelStrategy does."""
    checkpoint = torch.load(file, weights_only=True)
    [optimizer] = checkpoint.pop("optimizer_states")
    names = [f"network.{name}" for name, _ in DiT(**SMALL, end_time=True).named_parameters()]
    by_name = {
        "state": {names[number]: state for number, state in optimizer["state"].items()},
        "param_groups": [g | {"params": [names[n] for n in g["params"]]} for g in optimizer["param_groups"]],
    }
    state = {"state_dict": checkpoint.pop("state_dict"), "optimizer_0": by_name}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save(checkpoint, folder / "meta.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny teacher, the checkpoint of two steps from it, and the same in shards."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logging, "raiseExceptions", False)
        torch.manual_seed(0)
        save(DiT(**SMALL), "teacher")
        argv = ["decm", "fit", *FIT, "--trainer.max_steps", "2", "--trainer.callbacks", SAVING]
        patch.setattr(sys, "argv", argv)
        assert cli.main() == 0
        Path("step=2.ckpt").rename("plain.ckpt")
    in_shards(folder / "plain.ckpt", folder / "shards")
    return folder


@pytest.fixture
def decm(trained, monkeypatch, tmp_path, capsys):
    """A function that runs one command in a folder with copies of all that, and returns (exit code, out, err)."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler keeps the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def assert_equal(one, other):
    """Check that two trees of dicts, lists, tensors and values are equal to the bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_shards_become_the_checkpoint_that_they_were(decm):
    """Weights, averages, optimizer, schedule and progress are bit-identical."""
    code, out, _ = decm("consolidate", "shards", "--out", "new/whole.ckpt")
    assert (code, out) == (0, "wrote new/whole.ckpt\n")
    assert [file.name for file in Path("new").iterdir()] == ["whole.ckpt"]
    plain = torch.load("plain.ckpt", weights_only=True)
    plain["state_dict"] = dict(plain["state_dict"])
    assert_equal(torch.load("new/whole.ckpt", weights_only=True), plain)
    assert plain["optimizer_states"][0]["state"][1]["step"] == 2


def test_training_goes_on_from_the_file(decm):
    """The weights are bit-identical to those of a run resumed from the original checkpoint."""
    assert decm("consolidate", "shards")[0] == 0
    for path in ("plain.ckpt", "shards.consolidated"):
        argv = ["fit", *FIT, "--trainer.max_steps", "4", "--trainer.callbacks", SAVING, "--ckpt_path", path]
        assert decm(*argv)[0] == 0
        Path("step=4.ckpt").rename(f"{path}.four")
    plain, consolidated = (torch.load(f"{path}.four")["state_dict"] for path in ("plain.ckpt", "shards.consolidated"))
    assert all(torch.equal(plain[name], consolidated[name]) for name in plain)


def test_shards_are_exported_as_the_checkpoint_that_they_were(decm):
    assert decm("export", "shards", "student")[0] == 0
    assert decm("export", "plain.ckpt", "expected")[0] == 0
    files = ["README.md", "config.json", "model.safetensors", "record.json", "samples.png"]
    assert sorted(file.name for file in Path("student").iterdir()) == files
    for name in ("config.json", "model.safetensors"):
        assert Path("student", name).read_bytes() == Path("expected", name).read_bytes()


def test_shards_are_sampled_as_they_are(decm):
    for model in ("shards", "plain.ckpt"):
        assert decm("sample", model, "--per_class", "1", "--out", f"{model}.png")[0] == 0
    assert Path("shards.png").read_bytes() == Path("plain.ckpt.png").read_bytes()


def lose(name):
    return lambda: next(Path("shards").glob(name)).unlink()


def cut():
    file = next(Path("shards").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])


def forget_the_network():
    rest = torch.load("shards/meta.pt")
    del rest["network"]
    torch.save(rest, "shards/meta.pt")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lose("meta.pt"), "shards is incomplete, it lacks meta.pt: "),
        (lose(".metadata"), "shards is incomplete, it lacks .metadata: "),
        (lose("*.distcp"), "shards cannot be read: "),
        (cut, "shards cannot be read: "),
        (lambda: Path("shards/meta.pt").write_text("none"), "shards/meta.pt cannot be read: text instead of tensors"),
        (forget_the_network, "shards is not a checkpoint of decm-lightning: it does not describe its network"),
    ],
)
def test_shards_that_are_not_whole_are_refused(fault, message, decm):
    """Every command that reads them refuses them, and writes nothing."""
    fault()
    merge = [] if fault is forget_the_network else [["consolidate", "shards", "--out", "new"]]
    for argv in (*merge, ["export", "shards", "new"], ["sample", "shards"]):
        code, _, err = decm(*argv)
        assert code == 2
        assert err.startswith(f"decm: error: {message}")
        assert err.count("\n") == 1
    if fault is not forget_the_network:
        with pytest.raises(ValueError, match="shards"):
            read_whole(Path("shards"), Path())
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["consolidate", "gone"], "no checkpoint at gone"),
        (["consolidate", "plain.ckpt"], r"plain.ckpt is .*\.metadata and meta\.pt"),
        (["consolidate", "teacher"], r"teacher is .*\.metadata and meta\.pt"),
        (["consolidate", "shards", "--out", "shards"], "out must differ from the path of the checkpoint: got shards"),
        (["consolidate", "shards", "--out", "teacher"], "out must be a file: teacher is a folder"),
        (
            ["fit", *FIT, "--ckpt_path", "shards"],
            "shards is a sharded checkpoint, which only ModelParallelStrategy reads: .*decm consolidate shards",
        ),
        (["test", *FIT, "--ckpt_path", "shards"], "shards is a sharded checkpoint, which only ModelParallelStrategy"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, decm):
    code, _, err = decm(*argv)
    assert code == 2
    assert re.match(f"decm: error: {message}", err)
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_fit_that_meets_a_shard_cut_short_gives_one_line(decm):
    """A separate run with a process group. torch's exception does not derive from Exception."""
    cut()
    strategy = "lightning.pytorch.strategies.ModelParallelStrategy"
    sharded = ["--trainer.strategy", strategy, "--trainer.strategy.data_parallel_size", "1"]
    sharded += [
        "--trainer.strategy.tensor_parallel_size",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "1",
    ]
    argv = [sys.executable, "-m", "decm_lightning", "fit", *FIT, *sharded, "--ckpt_path", "shards"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "decm: error: a sharded checkpoint cannot be read or written: " in result.stderr


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("path", ["plain.ckpt", "shards"])
def test_a_checkpoint_of_another_architecture_is_refused(command, path, decm):
    """The error names both before anything is loaded."""
    save(DiT(**SMALL | {"width": 32, "depth": 2}), "teacher")
    argv = [command, *FIT, "--ckpt_path", path]
    if path == "shards":
        strategy = "lightning.pytorch.strategies.ModelParallelStrategy"
        argv += ["--trainer.strategy", strategy, "--trainer.strategy.data_parallel_size", "1"]
    code, _, err = decm(*argv)
    differing = "width: 16 in the checkpoint, 32 in the config, depth: 1 in the checkpoint, 2 in the config"
    assert code == 2
    assert err.startswith(f"decm: error: {path} ")
    assert f"({differing})" in err
    assert err.count("\n") == 1
