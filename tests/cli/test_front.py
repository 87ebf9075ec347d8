"""The command line around a command: early checks, suggestions, modules next to a config, output."""

import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from decm_lightning import cli
from decm_lightning.cli.early_checks import check_inputs
from decm_lightning.cli.messages import describe, did_you_mean
from decm_lightning.cli.output import Output
from decm_lightning.networks import DiT, save
from decm_lightning.samplers import sampler

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 1
  limit_val_batches: 0
  num_sanity_val_steps: 0
  enable_progress_bar: false
  logger: false
  enable_checkpointing: false
model:
  class_path: decm_lightning.Distiller
  init_args: {teacher: {class_path: decm_lightning.teachers.PretrainedTeacher, init_args: {path: teacher}}}
data: {class_path: decm_lightning.data.Digits, init_args: {batch_size: 16}}
"""
TEACHER = "model.init_args.teacher.init_args.path"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a teacher and a config."""
    torch.manual_seed(0)
    save(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10), tmp_path / "teacher")
    Path(tmp_path, "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Lightning's log handler keeps the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    return tmp_path


@pytest.fixture
def decm(place, monkeypatch, capsys):
    """A function that runs one command: (exit code, out, err)."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def test_help_lists_each_command_under_its_group(decm):
    code, out, _ = decm("--help")
    assert code == 0
    lines = out.splitlines()
    for name, command in cli.COMMANDS.items():
        above = lines[: next(row for row, line in enumerate(lines) if line.startswith(f"  {name} "))]
        assert [line for line in above if line.endswith(":") and line[0] != " "][-1] == f"{command.group}:"
    assert decm()[1] == out


def test_the_version_is_the_package_s(decm):
    assert decm("--version")[:2] == (0, version("decm-lightning") + "\n")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["fit"], "--config"),
        (["fti"], "did you mean fit?"),
        (["fit", "--config", "gone.yaml"], "gone.yaml"),
        (["test", "-c", "config.yaml", "--ckpt_path=gone.ckpt"], "gone.ckpt"),
        (["fit", "--config", "broken.yaml"], "broken.yaml:4: "),
        (["fit", "--config", "config.yaml", f"--{TEACHER}", "gone"], f"gone ({TEACHER})"),
        (["fit", "--config", "config.yaml", "--model.teacher.path=gone"], f"gone ({TEACHER})"),
        (["fit", "--config", "idx.yaml"], "gone (data.init_args.folder)"),
        (["fit", "--config", "config.yaml", "--config", "idx.yaml"], "gone (data.init_args.folder)"),
        (["sample", "--steps", "2", "gone"], "gone"),
        (["sample", "runs/gone/last.ckpt"], "runs/gone/last.ckpt"),
        (["sample-prompts", "teacher", "--encoder", "minilm", "--prompts", "gone.txt"], "gone.txt"),
        (["export", "gone", "new"], "gone"),
        (["sample", "run"], "use run/checkpoints/last.ckpt"),
        (["test", "runs"], "use runs/new/checkpoints/last.ckpt"),
        (["export", "run/checkpoints", "new"], "use run/checkpoints/last.ckpt"),
        (["fit", "--config", "config.yaml", "--ckpt_path", "run"], "use run/checkpoints/last.ckpt"),
        (["fit", "--config", "config.yaml", f"--{TEACHER}", "run"], "use run/checkpoints/last.ckpt"),
        (["consolidate", "gone"], "gone"),
        (["validate-data", "gone"], "gone"),
        (["encode", "--images", "gone", "--vae", "vae", "--out", "new"], "gone"),
        (["encode-pairs", "gone", "--size", "8"], "gone"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_imported(argv, named, place):
    Path("broken.yaml").write_text("trainer:\n  max_steps: 1\n  callbacks: [1\nmodel: 2\n")
    Path("idx.yaml").write_text("data: {class_path: decm_lightning.data.IDXImages, init_args: {folder: gone}}")
    for time, run in enumerate(("run", "runs/new", "runs/old")):
        Path(run, "checkpoints").mkdir(parents=True)
        Path(run, "checkpoints/last.ckpt").touch()
        os.utime(Path(run, "checkpoints/last.ckpt"), (-time, -time))
    code = "import sys; from decm_lightning import cli; code = cli.main(); "
    code += "print(code, {'torch', 'lightning', 'jsonargparse', 'numpy'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert result.stdout == "2 set()\n"
    assert named in result.stderr
    assert result.stderr.startswith("decm: error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "gone_teacher.yaml", f"--{TEACHER}", "teacher"],
        ["--config", "gone_teacher.yaml", "--model.teacher.path=teacher"],
        ["--config", "gone_teacher.yaml", "--config", "config.yaml"],
        ["--config", "gone_teacher.yaml", "--model.init_args.teacher.class_path", "my.Teacher"],
        ["--config", "gone_teacher.yaml", "--model", "my.Model"],
        ["--config", "config.yaml", f"--{TEACHER}", "user/name"],
        ["--config", "gone_teacher.yaml", "--print_config"],
        ["--config", "config.yaml", "--ckpt_path", "last"],
        ["--config", "config.yaml", "--ckpt_path", "s3://bucket/last.ckpt"],
        ["--config", "config.yaml", "--trainer.callbacks.folder", "new"],
        ["--config", "config.yaml", "--data.class_path", "my.Data", "--data.init_args.folder", "new"],
        ["--config", "data: {init_args: {batch_size: 8}}"],
    ],
)
def test_what_may_be_right_is_left_to_the_command(argv, place):
    Path("gone_teacher.yaml").write_text(CONFIG.replace("path: teacher", "path: gone"))
    files = [value for value in argv if value.endswith(".yaml")]
    assert check_inputs(argv, {"ckpt_path": "checkpoint"}, ()) == files
    with pytest.raises(FileNotFoundError, match="gone"):
        check_inputs(argv[:2] if "gone" in argv[1] else ["--ckpt_path", "gone"], {"ckpt_path": "checkpoint"}, ())


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["sampel"], "sample"),
        (["sample", "teacher", "--stpes", "2"], "--steps"),
        (["sample", "teacher", "--sampler", "eulre"], "euler"),
        (["fit", "--config", "config.yaml", "--trainer.max_step", "5"], "--trainer.max_steps"),
        (["fit", "--config", "config.yaml", "--trainr.max_steps=5"], "--trainer.max_steps"),
        (["fit", "--config", "config.yaml", "--data", "decm_lightning.data.Digit"], "decm_lightning.data.Digits"),
        (["fit", "--config", "typo.yaml"], "decm_lightning.data.Digits"),
        (["fit", "--config", "config.yaml", "--data", "decm_lightning.dat.Digits"], "decm_lightning.data"),
        (["fit", "--config", "config.yaml", "--data", "Digit"], "Digits"),
        (["fit", "--config", "config.yaml", "--model.init_args.ema_deca", "0.9"], "ema_decay"),
        (["fit", "--config", "config.yaml", "--model.guidance.scal", "2"], "--guidance.scale"),
        (["fit", "--config", "nested.yaml"], "scale"),
        (["fit", "config.yaml"], "--config config.yaml"),
        (["fit", "c.yaml"], "--config c.yaml"),
        (["fit", "--config", "config.yaml", "--model.init_args.objective", "facn"], "facm"),
        (["fit", "--config", "section.yaml"], "trainer.max_steps"),
    ],
)
def test_a_typo_is_answered_by_what_was_meant(argv, meant, decm):
    Path("typo.yaml").write_text(CONFIG.replace("data.Digits", "data.Digit"))
    Path("nested.yaml").write_text(CONFIG.replace("{teacher:", "{guidance: {scal: 2}, teacher:"))
    Path("section.yaml").write_text(CONFIG.replace("max_steps", "max_step"))
    code, _, err = decm(*argv)
    assert code == 2
    assert f"; did you mean {meant}?\n" in err


def test_a_sampler_s_name_is_suggested_wherever_it_is_misspelled():
    with pytest.raises(ValueError, match="miix") as raised:
        sampler("miix")
    assert describe(raised.value).endswith("; did you mean mix?")


def test_nothing_is_meant_by_a_word_that_is_right_or_far_off():
    assert did_you_mean("fit", ["fit", "fits"]) == ()
    assert did_you_mean("xyz", ["fit", "fits"]) == ()
    assert did_you_mean("fitz", ["fit", "test"]) == ("did you mean fit?",)


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "teacher", "--step", "2"],
        ["sample", "teacher", "--per=2"],
        ["sample", "teacher", "--confi", "config.yaml"],
        ["fit", "--config", "config.yaml", "--ckpt", "teacher"],
        ["fit", "--config", "config.yaml", "--trainer.max_step", "2"],
        ["fit", "--config", "config.yaml", "--model.init_args.ema_dec", "0.5"],
        ["fit", "--config", "config.yaml", "--model.guidance.sc", "2"],
    ],
)
def test_abbreviations_are_refused(argv, decm):
    code, _, err = decm(*argv)
    assert code == 2
    assert argv[-2 if "=" not in argv[-1] else -1].partition("=")[0].rpartition(".")[2].strip("-") in err


def write_module(folder: Path, name: str) -> str:
    """Write a data module and return a config with it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text("from decm_lightning.data import Digits\n\n\nclass MyData(Digits):\n    pass\n")
    return CONFIG.replace("decm_lightning.data.Digits", f"{name}.MyData")


@pytest.mark.parametrize("folder", ["elsewhere", "."])
def test_a_module_next_to_the_config_is_found(folder, decm, place, monkeypatch):
    """A module there does not shadow an installed package."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(place))])
    name = f"photos_{folder.strip('.')}"
    config = write_module(place / folder, name)
    (place / folder / "sklearn.py").write_text("raise AssertionError('not this one')")
    Path(folder, "my.yaml").write_text(config)
    assert decm("fit", "--config", f"{folder}/my.yaml")[0] == 0
    assert sys.modules.pop(name).__file__ == str(place / folder / f"{name}.py")


def test_a_module_in_the_working_directory_is_found(decm, place, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(place))])
    config = write_module(place, "photos_here")
    Path("elsewhere").mkdir()
    Path("elsewhere/my.yaml").write_text(config)
    assert decm("fit", "--config=elsewhere/my.yaml")[0] == 0
    assert sys.modules.pop("photos_here").__file__ == str(place / "photos_here.py")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes_find_a_module_next_to_the_config(strategy, place):
    Path("elsewhere").mkdir()
    Path("elsewhere/my.yaml").write_text(write_module(place / "elsewhere", "photos_elsewhere"))
    argv = ["fit", "--config", "elsewhere/my.yaml", "--trainer.devices", "2", "--trainer.strategy", strategy]
    code = "import sys; from decm_lightning.cli import main; sys.exit(main())"
    Path("script").mkdir()
    # Like the installed command, whose folder is on sys.path instead of the working directory.
    Path("script/decm.py").write_text(f"if __name__ == '__main__':\n    {code}\n")
    result = subprocess.run([sys.executable, "script/decm.py", *argv], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


def test_output_outlives_its_reader():
    """Output to a closed pipe is discarded, including buffered output."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        output = Output(stream)
        print("kept", file=output, flush=True)
        assert os.read(read, 10) == b"kept\n"
        os.close(read)
        for _ in range(3):
            print("lost" * 10_000, file=output)
            output.flush()
        assert output.fileno() == write


def test_a_command_ends_well_when_its_reader_has_gone(place):
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-m", "decm_lightning", "--help"]
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_without_a_logger_nothing_monitors_the_learning_rate(decm):
    """Lightning's callback, which every config of the package has, would end the run."""
    monitor = "lightning.pytorch.callbacks.LearningRateMonitor"
    code, _, err = decm("fit", "--config", "config.yaml", "--trainer.callbacks", monitor)
    assert code == 0, err


BARS = """
import sys
from contextlib import redirect_stdout
from rich.console import Console
from rich.live import Live
from decm_lightning.cli.output import Output
outer, inner = (Live(console=Console(force_terminal=True)) for _ in range(2))
with outer, redirect_stdout(Output(sys.stdout)), inner:
    print("between the bars")
"""


def test_bars_of_rich_outside_and_inside_of_a_command_end():
    """As in a notebook whose first bar is still open: each bar wrote to the other one, without end."""
    done = subprocess.run([sys.executable, "-c", BARS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("between the bars") == 1
