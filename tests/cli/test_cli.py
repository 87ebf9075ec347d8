"""The command line as a user runs it: its results and its error messages."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from decm_lightning import cli
from decm_lightning.cli.trainer import TrainerCLI
from decm_lightning.derivatives import NoTangentError
from decm_lightning.networks import MLP, DiT, load, save
from decm_lightning.sample_folder import SampleFolder
from tests.unprivileged import open_folder, unprivileged

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs/digits/decm.yaml")
TINY = [
    *("--trainer.max_steps", "2"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.logger.init_args.name", "trial"),
    *("--data.init_args.batch_size", "16"),
    *("--data.init_args.reference_size", "32"),
]

RECOMMENDED = ("--model.init_args.objective", "decm_lightning.losses.end_identity")


@pytest.fixture
def decm(monkeypatch, tmp_path, capsys):
    """A function that runs one command in an empty folder with a tiny teacher in `teacher`: (exit code, out, err)."""
    torch.manual_seed(0)
    save(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10), tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    # Lightning's log handler keeps the standard error of the first test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def digits(command: str, *argv: str) -> list[str]:
    return [command, "--config", DIGITS, "--model.init_args.teacher.init_args.path", "teacher", *TINY, *argv]


def test_help_answers_without_importing_torch():
    code = "import sys; from decm_lightning import cli; cli.main(); sys.exit('torch' in sys.modules)"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - started < 3
    assert all(command in result.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("command", ["sample", "export", "validate-data"])
def test_each_command_has_help_of_its_own(command, decm):
    with pytest.raises(SystemExit) as stopped:
        decm(command, "--help")
    assert stopped.value.code == 0


def test_fit_resume_test_sample_and_export_follow_each_other(decm, tmp_path):
    config = yaml.safe_load(Path(DIGITS).read_text())
    by_name = {callback["class_path"].split(".")[-1]: callback for callback in config["trainer"]["callbacks"]}
    by_name["ModelCheckpoint"]["init_args"]["every_n_train_steps"] = 1
    by_name["Evaluation"]["init_args"] |= {"test_specs": ["student/mix/1", "student/euler/2"], "test_samples": 20}
    Path("config.yaml").write_text(yaml.safe_dump(config))

    def run(command: str, *argv: str) -> tuple[int, str, str]:
        return decm(*(part if part != DIGITS else "config.yaml" for part in digits(command, *argv)))

    assert run("fit")[0] == 0
    last = "runs/trial/version_0/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert run("fit", "--ckpt_path", last, "--trainer.max_steps", "3")[0] == 0
    assert torch.load(last.replace("_0", "_1"), weights_only=True)["global_step"] == 3
    whole = torch.load(last, weights_only=True)
    for lacking in ("optimizer_states", "state_dict"):
        torch.save({key: value for key, value in whole.items() if key != lacking}, "partial.ckpt")
        code, _, err = run("fit", "--ckpt_path", "partial.ckpt", "--trainer.max_steps", "3")
        assert code == 2
        assert f"decm: error: partial.ckpt lacks {lacking}: " in err
    code, _, err = run("test", "--ckpt_path", last, "--trainer.callbacks", "[]")
    assert code == 2
    assert "decm: error: nothing was measured: test needs a callback that logs" in err
    code, out, _ = run("test", "--ckpt_path", last)
    assert code == 0
    assert "| student | mix | 1 | 1 |" in out
    rows = json.loads(Path(last).with_name("last.quality.json").read_text())["rows"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [("mix", 1), ("euler", 2)]
    assert Image.open(Path(last).with_name("last.samples.png")).width > 100
    # Testing writes nothing else.
    assert {path.name for path in Path("runs/trial").iterdir()} == {"version_0", "version_1"}

    assert decm("sample", last, "--steps", "2", "--classes", "[3, 7]", "--per_class", "5", "--out", "grid.png")[0] == 0
    assert Image.open("grid.png").size == (5 * 8 * 4, 2 * 8 * 4)
    assert decm("export", last, "student")[0] == 0
    assert decm("export", last, "half", "--dtype", "float16")[0] == 0
    whole, half = (load(folder).state_dict() for folder in ("student", "half"))
    assert Path("half/model.safetensors").stat().st_size < 0.6 * Path("student/model.safetensors").stat().st_size
    for name, tensor in whole.items():
        assert half[name].dtype == tensor.dtype == torch.float32
        torch.testing.assert_close(half[name], tensor, rtol=2**-10, atol=1e-6)
    assert (
        decm("sample", "student", "--steps", "2", "--classes", "[3, 7]", "--per_class", "5", "--out", "again.png")[0]
        == 0
    )
    assert Image.open("again.png").tobytes() == Image.open("grid.png").tobytes()


WRITER = ["--trainer.callbacks+", "decm_lightning.evaluation.SampleWriter", "--trainer.callbacks.folder", "samples"]
WRITER += ["--trainer.callbacks.samples", "30"]


def test_predict_writes_the_images_of_sample(decm):
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "saved", "every_n_train_steps": 2, "filename": "two"},
    }
    assert decm(*digits("fit", "--trainer.callbacks", json.dumps([saving])))[0] == 0
    predict = digits("predict", "--ckpt_path", "saved/two.ckpt")
    code, _, err = decm(*predict)
    assert code == 2
    assert "predict needs a SampleWriter" in err
    assert " ".join(WRITER[:3]) in err
    assert decm(*predict, *WRITER, "--trainer.callbacks.spec", "teacher/euler/2")[0] == 0
    written = {file.name: file.read_bytes() for file in Path("samples").glob("*.png")}
    assert len(written) == 30
    sampler = ("--sampler", "euler", "--steps", "2", "--per_class", "3")
    assert decm("sample", "saved/two.ckpt", *sampler, "--out", "again")[0] == 0
    assert written == {file.name: file.read_bytes() for file in Path("again").glob("*.png")}


RENOISED = ("sample", "teacher", "--sampler", "consistency", "--steps", "2", "--out")


def test_sample_writes_one_file_for_each_image_and_repeats_itself(decm):
    for folder in ("a", "b"):
        assert decm(*RENOISED, folder, "--per_class", "1")[0] == 0
    names = sorted(file.name for file in Path("a").iterdir())
    assert names == [*(f"{i:06d}_class{i}.png" for i in range(10)), "settings.json"]
    assert all((Path("a") / name).read_bytes() == (Path("b") / name).read_bytes() for name in names)


def test_an_image_depends_on_seed_and_number_alone(decm, monkeypatch):
    """Noise depends on all bits of the seed, and not on the other images of a batch."""
    torch.manual_seed(0)
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=True)
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
    save(network, "teacher")
    assert decm(*RENOISED, "all", "--per_class", "2")[0] == 0
    monkeypatch.setattr("decm_lightning.cli.sample.BATCH", 3)
    assert decm(*RENOISED, "threes", "--per_class", "2")[0] == 0
    for file in Path("all").glob("*.png"):
        one, other = (torch.tensor(list(Image.open(Path(folder, file.name)).getdata())) for folder in ("all", "threes"))
        assert (one - other).abs().max() <= 1
    first = set()
    for seed in (0, 1, 2**32, 2**63 - 1):
        assert decm(*RENOISED, f"seed-{seed}", "--classes", "[0]", "--seed", str(seed))[0] == 0
        first |= {file.read_bytes() for file in Path(f"seed-{seed}").glob("*.png")}
    assert len(first) == 4 * 8


def test_a_folder_of_samples_resumes_or_is_refused(decm):
    """Only complete images of the same settings are reused."""
    decm(*RENOISED, "whole", "--per_class", "2")
    code, out, _ = decm(*RENOISED, "parts", "--per_class", "2")
    assert (code, out.splitlines()[-1]) == (0, "wrote 20 images to parts (consistency, 2 steps); 0 of 20 existed")
    expected = {file.name: file.read_bytes() for file in Path("whole").iterdir()}
    Path("parts/000001_class1.png").unlink()
    Path("parts/000002_class2.png").write_bytes(expected["000002_class2.png"][:-5])
    Path("parts/000012_class2.png").write_bytes(b"")
    Image.new("L", (16, 16)).save("parts/000003_class3.png")
    code, out, _ = decm(*RENOISED, "parts", "--per_class", "2")
    assert (code, out.splitlines()[-1]) == (0, "wrote 4 images to parts (consistency, 2 steps); 16 of 20 existed")
    assert {file.name: file.read_bytes() for file in Path("parts").iterdir()} == expected
    assert "wrote 0 images to parts (consistency, 2 steps); 20 of 20" in decm(*RENOISED, "parts", "--per_class", "2")[1]
    for changed, argv in (
        ("classes: [0, 1", ("--classes", "[3, 5]")),
        ("steps: 2 in the folder, requested 8", ("--steps", "8")),
        ("seed: 0 in the folder, requested 1", ("--seed", "1")),
        ("sampler: consistency in the folder, requested mix", ("--sampler", "mix")),
        ("per_class: 2 in the folder, requested 3", ("--per_class", "3")),
    ):
        code, _, err = decm(*RENOISED, "parts", "--per_class", "2", *argv)
        assert code == 2
        assert f"decm: error: parts has samples of other settings ({changed}" in err
    save(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10), "teacher")
    assert "other settings (weights: " in decm(*RENOISED, "parts", "--per_class", "2")[2]
    Path("photos").mkdir()
    Path("photos/me.jpeg").touch()
    assert "photos has other images (me.jpeg exists without settings.json" in decm(*RENOISED, "photos")[2]
    Path("parts/settings.json").write_text("")
    assert "parts/settings.json is damaged (empty): remove the folder" in decm(*RENOISED, "parts")[2]
    assert {file.name for file in Path("parts").iterdir()} == expected.keys()


def test_an_interrupted_sample_resumes(decm, monkeypatch):
    """Ctrl-C stops the command, and the written images are complete."""
    monkeypatch.setattr("decm_lightning.cli.sample.BATCH", 4)
    decm(*RENOISED, "whole", "--per_class", "1")
    plain, written = SampleFolder.write, []

    def write(self, name, image):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(name)
        plain(self, name, image)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "write", write)
        assert decm(*RENOISED, "parts", "--per_class", "1")[0] == 130
    assert "; 6 of 10 existed" in decm(*RENOISED, "parts", "--per_class", "1")[1]
    assert all(file.read_bytes() == Path("parts", file.name).read_bytes() for file in Path("whole").iterdir())


def test_the_default_sampler_fits_the_network(decm, caplog):
    """Large steps of a teacher lead to class means, so its default is Euler; a student's default is mix."""
    one = ("--classes", "[3]", "--per_class", "1")
    assert "(euler, 50 steps)" in decm("sample", "teacher", *one, "--out", "a.png")[1]
    assert "(euler, 4 steps)" in decm("sample", "teacher", *one, "--steps", "4", "--out", "b.png")[1]
    assert not caplog.messages
    for sampler in ("mix", "consistency"):
        caplog.clear()
        assert f"({sampler}, 2 steps)" in decm("sample", "teacher", *one, "--sampler", sampler, "--out", "c.png")[1]
        [message] = caplog.messages
        assert f"{sampler} blurs its samples: use --sampler euler --steps 50" in message
    caplog.clear()
    save(load("teacher").with_end_time(), "student")
    assert "(mix, 2 steps)" in decm("sample", "student", *one, "--out", "d.png")[1]
    later = ("--sampler", "mix?s1=0.6", "--steps", "4")
    assert "(mix?s1=0.6, 4 steps)" in decm("sample", "student", *one, *later, "--out", "e.png")[1]
    assert "(euler, 50 steps)" in decm("sample", "student", *one, "--sampler", "euler", "--out", "f.png")[1]
    assert not caplog.messages


@pytest.mark.parametrize("out", ["new", "new/deeper", "grid.png", ""])
@pytest.mark.parametrize("command", ["sample", "export"])
def test_a_folder_that_may_not_be_written_is_named(command, out, decm):
    with open_folder() as folder:
        shutil.copytree("teacher", folder / "teacher")
        (folder / "locked").mkdir(mode=0o555)
        target = str(folder / "locked" / out)
        # Another user may not be able to read Python's own folders: what is imported late is imported now.
        decm("export", "nowhere", "new")
        with unprivileged():
            argv = ["--out", target] if command == "sample" else [target]
            code, _, err = decm(command, str(folder / "teacher"), *argv)
        assert code == 2
        assert str(folder / "locked") in err
        assert "Permission denied" in err
        assert not list((folder / "locked").iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "command 'train'"),
        (["sample", "nowhere"], "no checkpoint or folder at nowhere"),
        (["sample", "teacher", "--steps", "0"], "steps must be at least 1: got 0"),
        (["sample", "teacher", "--steps", "two"], "steps: expected an integer: got two"),
        (["sample", "teacher", "--classes", "3"], "classes: expected a list, such as '[1, 2]': got 3"),
        (["sample", "teacher", "--classes", "[3, 11]"], "classes must be from 0 to 9: got 11"),
        (
            ["sample", "teacher", "--sampler", "heun"],
            "or a path such as my_module.heun: got 'heun'",
        ),
        (["sample", "teacher", "--per_class", "0"], "per_class must be at least 1: got 0"),
        (["sample", "teacher", "--scale", "100000"], "scale must be from 1 to 64: got 100000"),
        (["sample", "teacher", "--seed", "-1"], "seed must be from 0 to 2**63 - 1: got -1"),
        (["sample", "teacher", "--seed", "18446744073709551616"], "2**63 - 1: got 18446744073709551616"),
        (["sample", "teacher", "--seed", "9223372036854775808"], "2**63 - 1: got 9223372036854775808"),
        (["sample", "teacher", "--out", ""], "out must be a folder or a .png file: got ''"),
        (["sample", "teacher", "--sampler", "euler?s1=0.5"], "sampler euler has no option 's1'"),
        (["sample", "points", "--per_class", "1"], "the model generates shape (2,)"),
        (
            ["sample", "teacher", "--sampler=mix?s1=1.5", "--steps", "2"],
            "s1 must be between 0 and 1, both excluded: got 1.5",
        ),
        (["export", "nowhere.ckpt", "out"], "no checkpoint or folder at nowhere.ckpt"),
        (["export", "teacher", ""], "must have a name: got ''"),
        (["export", "teacher", "list.yaml"], "list.yaml is a file: "),
        (["export", "teacher", "other"], "other contains another model (config.json is not of decm-lightning)"),
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (digits("fit", "--model.init_args.ema_deca", "0.9"), "Option 'ema_deca' is not accepted"),
        (digits("fit", "--model.init_args.ema_decay", "1.5"), "ema_decay must be in [0, 1): got 1.5"),
        (digits("fit", "--data.init_args.batch_size", "0"), "batch_size must be at least 1: got 0"),
        (digits("fit", "--model.init_args.guidance.scale", "-1"), "guidance scale must be at least 0: got -1.0"),
        (digits("fit", "--model.init_args.guidance", "1.5"), "guidance: expected keys with values, such as '{key: 1}'"),
        (digits("fit", "--model.init_args.teacher.init_args.path", "gone"), "no checkpoint or folder at gone"),
        (
            digits("fit", *RECOMMENDED, "--model.init_args.objective.init_args.normalization", "l3"),
            "normalization: expected one of ",
        ),
        (digits("fit", "--model.init_args.objective", "fcm"), "lagrangian, mean_flow, scm"),
        (digits("fit", "--model.init_args.objective", "fcm"), "got fcm; did you mean facm?"),
        (
            digits("fit", "--model.init_args.objective", "decm_lightning.losses.papr"),
            "did you mean decm_lightning.losses.paper?",
        ),
        (
            digits("fit", *RECOMMENDED, "--model.init_args.objective.init_args.n2n_evry", "3"),
            "Option 'n2n_evry' is not accepted. Got value: 3; did you mean n2n_every?",
        ),
        (digits("test", "--ckpt_path", "gone.ckpt"), "gone.ckpt"),
        (digits("test"), "test needs --ckpt_path"),
        (["sample", "teacher", "--device", "nowhere"], "device 'nowhere' is not available"),
        (
            digits("fit", "--trainer.callbacks.test_specs", "[student/mix/0]"),
            "spec 'student/mix/0': steps must be at least 1: got 0",
        ),
        (["sample", "teacher", "--classes", "[]"], "classes must be at least one label: got none"),
        (["sample", "diverged"], "images are not finite: the weights have diverged"),
        (["sample", "renamed"], "renamed cannot be loaded: DiT.__init__() got an unexpected keyword argument 'colour'"),
        (
            digits("fit", "--model.init_args.teacher.init_args.path", "renamed"),
            "renamed cannot be loaded: DiT.__init__",
        ),
        (["fit"], "fit needs --config FILE"),
        (
            ["fit", "--config", "empty.yaml"],
            "empty.yaml must be a mapping with keys such as trainer, model and data: got nothing",
        ),
        (
            ["fit", "--config=list.yaml"],
            "list.yaml must be a mapping with keys such as trainer, model and data: got list",
        ),
        (["test", "-c", "broken.yaml"], "broken.yaml:1: not YAML: "),
        (digits("fit", "--trainer.max_steps", "0"), "trainer.max_steps must be at least 1, or -1 for no limit: got 0"),
        (
            digits("fit", "--trainer.max_epochs", "0"),
            "trainer.max_epochs must be at least 1, or -1 for no limit: got 0",
        ),
        # Before the model is loaded, which is not a LoRA student.
        (["export", "teacher", "out", "--to", "lora"], "must end in .safetensors: got out"),
        (digits("fit", "--data.init_args.reference_size", "-5"), "reference_size must be at least 1: got -5"),
        (
            digits("test", "--ckpt_path", "teacher", "--trainer.callbacks.test_specs", "[]"),
            "test_specs must name at least one model",
        ),
    ],
)
def test_bad_input_gives_one_clear_line_and_exit_code_2(argv, message, decm):
    network = load("teacher")
    torch.nn.init.constant_(network.final_layer.linear.bias, float("nan"))
    save(network, "diverged")
    save(network, "renamed")
    save(MLP(num_classes=3), "points")
    Path("renamed/config.json").write_text(
        json.dumps(json.loads(Path("teacher/config.json").read_text()) | {"colour": 3})
    )
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "bert"}')
    for name, content in (("empty", ""), ("list", "- 1"), ("broken", "a: [1")):
        Path(f"{name}.yaml").write_text(content)
    code, _, err = decm(*argv)
    lines = [line for line in err.splitlines() if line.startswith("decm: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


def test_a_typo_in_a_yaml_is_named_with_its_place(decm):
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["model"]["init_args"]["guidance"] = {"scal": 2.0}
    config["model"]["init_args"]["teacher"]["init_args"]["path"] = "teacher"
    Path("typo.yaml").write_text(yaml.safe_dump(config))
    code, _, err = decm("fit", "--config", "typo.yaml")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("decm: error: model")
    assert "scal" in err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("a.jpg", "got a.jpg"),
        ("folder.png", "folder.png is a folder"),
        ("file", "got file (file: Not a directory)"),
        ("file/new/a.png", "got file/new/a.png (file: Not a directory)"),
        ("/proc/new/a.png", "got /proc/new/a.png (/proc: "),
        ("link/new", "link is a link to missing, which does not exist"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_drawn(out, message, decm):
    Path("folder.png").mkdir()
    Path("file").touch()
    Path("link").symlink_to("missing")
    # A folder without a network has its own message: the network is not even read.
    Path("empty").mkdir()
    code, _, err = decm("sample", "empty", "--out", out)
    assert code == 2
    assert err.startswith("decm: error: out must be a folder or a .png file")
    assert message in err
    assert not Path("a.jpg").exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--trainer.callbacks.samples", "1"], "samples must be at least 2: got 1"),
        (
            ["--model.init_args.ema_deca", "0.9"],
            "model: Option 'ema_deca' is not accepted. Got value: 0.9; did you mean ema_decay?",
        ),
    ],
)
def test_what_the_parser_tried_is_left_out(option, expected, decm):
    assert decm(*digits("fit", *option))[2].splitlines()[-1] == f"decm: error: {expected}"


def test_an_operation_without_a_tangent_is_named_in_one_line(monkeypatch, capsys):
    def refused(*_):
        raise NoTangentError("torch.sort: no rule for this operation")

    monkeypatch.setattr("decm_lightning.cli.sampling.load", refused)
    monkeypatch.setattr(sys, "argv", ["decm", "sample", "."])
    assert cli.main() == 2
    assert capsys.readouterr().err == "decm: error: torch.sort: no rule for this operation\n"


def test_a_bug_is_no_bad_input_and_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise AssertionError("a bug")

    monkeypatch.setattr("decm_lightning.cli.sampling.load", broken)
    monkeypatch.setattr(sys, "argv", ["decm", "sample", "."])
    with pytest.raises(AssertionError, match="a bug"):
        cli.main()


def test_the_traceback_is_there_for_the_asking(monkeypatch):
    monkeypatch.setenv("DECM_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["decm", "sample", "nowhere"])
    with pytest.raises(FileNotFoundError):
        cli.main()


@pytest.mark.slow
def test_the_installed_command_reports_by_its_exit_code(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "decm_lightning", "sample", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "decm: error: no checkpoint or folder at nowhere\n"


def test_python_may_be_found_by_a_relative_path():
    """The parser of Lightning's classes runs it from the folder of a config."""
    path = os.path.relpath(Path(sys.executable).parent, ROOT)
    arguments = "fit --config configs/digits/teacher.yaml --config configs/trainer/ddp.yaml --trainer.accelerator cpu"
    result = subprocess.run(
        ["python", "-m", "decm_lightning", *arguments.split(), "--print_config"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "gradient_as_bucket_view: true" in result.stdout


TRAINED = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 3
  limit_val_batches: 0
  num_sanity_val_steps: 0
  enable_progress_bar: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: runs, name: one, version: ""}}
model:
  class_path: decm_lightning.Distiller
  init_args: {teacher: {class_path: decm_lightning.teachers.PretrainedTeacher, init_args: {path: teacher}}}
data: {class_path: decm_lightning.data.Digits, init_args: {batch_size: 16}}
"""


@pytest.fixture
def trained(decm):
    """A function that runs a command on the config `config.yaml` of a student, whose objective is the default."""
    Path("config.yaml").write_text(TRAINED)
    return lambda command, *argv: decm(command, "--config", "config.yaml", *argv)


def test_a_saved_config_repeats_the_run(trained, decm, capsys):
    assert trained("fit")[0] == 0
    last = "runs/one/checkpoints/last.ckpt"
    first = torch.load(last, weights_only=True)
    saved = Path("runs/one/config.yaml").read_text()
    assert "Unable to serialize" not in saved
    assert yaml.safe_load(saved)["model"]["init_args"]["objective"] == "whole_triangle"
    assert yaml.safe_load(first["config"]) == yaml.safe_load(saved)
    shutil.copy("runs/one/config.yaml", "saved.yaml")
    shutil.rmtree("runs")
    assert decm("fit", "--config", "saved.yaml")[0] == 0
    again = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[name]) for name, value in first["state_dict"].items())
    with pytest.raises(SystemExit):
        trained("fit", "--print_config")
    assert "Unable to serialize" not in capsys.readouterr().out


def test_settings_of_data_and_trainer_that_differ_are_named(trained, caplog):
    assert trained("fit")[0] == 0
    checkpoint = ["--ckpt_path", "runs/one/checkpoints/last.ckpt"]
    assert trained("fit", *checkpoint, "--trainer.enable_model_summary", "false")[0] == 0
    assert "in the checkpoint)" not in caplog.text
    changed = ["--data.init_args.batch_size", "32", "--trainer.max_steps", "5", "--trainer.logger.init_args.name", "b"]
    assert trained("fit", *checkpoint, *changed)[0] == 0
    named = "trainer.max_steps 5 (3 in the checkpoint), data.init_args.batch_size 32 (16 in the checkpoint)"
    assert f"settings: {named}" in caplog.text


def test_a_checkpoint_never_overrides_the_command_line(trained):
    """Lightning's CLI would silently build the classes of a checkpoint's hyperparameters."""
    assert trained("fit")[0] == 0
    content = torch.load("runs/one/checkpoints/last.ckpt", weights_only=True)
    torch.save(content | {"hyper_parameters": {"_class_path": "gone.Class", "ema_decay": 7}}, "edited.ckpt")
    assert trained("fit", "--ckpt_path", "edited.ckpt", "--trainer.max_steps", "4")[0] == 0
    assert torch.load("runs/one/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("name", ["last", "best", "hpc", "nowhere.ckpt"])
def test_a_checkpoint_that_is_not_there_is_refused(command, name, trained):
    code, _, err = trained(command, "--ckpt_path", name, *(WRITER if command == "predict" else ()))
    assert code == 2
    assert name in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("decm: error: ")
    assert not list(Path().glob("runs/**/*.ckpt"))


def test_the_newest_checkpoint_of_the_experiment_is_named_and_found(trained):
    versions = ["--trainer.logger.init_args.version", "null"]
    assert trained("fit", *versions)[0] == 0
    code, _, err = trained("fit", "--ckpt_path", "last", *versions)
    assert code == 2
    assert "runs/one/version_0/checkpoints/last.ckpt" in err
    again = ["--trainer.logger.init_args.version", "0", "--trainer.max_steps", "5", "--ckpt_path", "last"]
    assert trained("fit", *again)[0] == 0
    assert torch.load("runs/one/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_an_error_in_a_run_is_one_line_and_a_file_with_its_traceback(trained, monkeypatch):
    def fail(*_):
        raise ValueError("something in the middle")

    monkeypatch.setattr("decm_lightning.distiller.Distiller.total", fail)
    code, _, err = trained("fit")
    assert code == 2
    file = Path("runs/one/traceback-0.txt")
    assert err.splitlines()[-1] == f"decm: error: something in the middle; traceback in {file}"
    assert "in fail" in file.read_text()


def test_an_error_before_a_run_leaves_no_file(trained):
    assert trained("fit", "--data.init_args.batch_size", "0")[0] == 2
    assert not Path("runs/one/traceback-0.txt").exists()


def test_ctrl_c_is_one_line_and_exit_code_130(decm, monkeypatch):
    """Also if Lightning turned it into exit code 1."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("decm_lightning.cli.export.load", interrupt)
    code, _, err = decm("export", "teacher", "out")
    assert (code, err) == (130, "decm: interrupted\n")

    def exit_with_1(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("decm_lightning.cli.export.load", exit_with_1)
    assert decm("export", "teacher", "out")[0] == 130


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed_everything=-1"], "seed_everything must be from 0 to 2**32 - 1: got -1"),
        (["--ckpt_path", "teacher"], "teacher is an exported folder"),
        (["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"], "wandb"),
        (["--trainer.max_steps=-5"], "-5"),
    ],
)
def test_a_fit_s_settings_are_refused_in_one_line(argv, said, trained):
    code, _, err = trained("fit", *argv)
    assert code == 2
    assert said in err.splitlines()[-1]
    assert "<class" not in err


def test_slurm_s_ntasks_alone_is_one_line(trained, monkeypatch):
    for name, value in {"NTASKS": 4, "JOB_NAME": "train", "JOB_ID": 1, "LOCALID": 0, "NODEID": 0, "PROCID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    code, _, err = trained("fit")
    assert code == 2
    assert "--ntasks-per-node=4" in err.splitlines()[-1]


@pytest.mark.parametrize("student", [None, "decm_lightning.networks.load"])
@pytest.mark.parametrize("rank", [0, 1])
def test_weights_of_networks_to_be_sharded_are_in_the_first_process_alone(rank, student, trained, monkeypatch):
    network = DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10, end_time=True)
    save(network, "student")
    built = []
    monkeypatch.setattr(TrainerCLI, "run", lambda self: built.append(self.model))
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    argv = ["--model.init_args.student", student, "--model.init_args.student.path", "student"] if student else []
    strategy = ["--trainer.strategy.class_path", "decm_lightning.training.strategies.FSDP2", "--trainer.devices", "1"]
    assert trained("fit", *strategy, *argv)[0] == 0
    (distiller,) = built
    networks = (distiller.network, distiller.average, *distiller.teacher.networks())
    assert len(networks) == 3
    assert {parameter.is_meta for each in networks for parameter in each.parameters()} == {rank == 1}


def test_a_teacher_that_is_not_sharded_keeps_its_weights_in_every_process(trained, monkeypatch, tmp_path):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=2, num_layers=1, sample_size=8,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "diffusers")
    built = []
    monkeypatch.setattr(TrainerCLI, "run", lambda self: built.append(self.model))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    config = yaml.safe_load(TRAINED)
    config["model"]["init_args"] = {
        "teacher": {
            "class_path": "decm_lightning.teachers.DiffusersTeacher",
            "init_args": {"model": str(tmp_path / "diffusers")},
        },
        "student": {
            "class_path": "decm_lightning.networks.DiT",
            "init_args": {"input_size": 8, "in_channels": 1, "width": 16, "depth": 1, "heads": 2, "end_time": True},
        },
    }
    config["trainer"]["strategy"] = {"class_path": "decm_lightning.training.strategies.FSDP2"}
    config["trainer"]["devices"] = 1
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert trained("fit")[0] == 0
    assert not any(parameter.is_meta for parameter in built[0].teacher.network.parameters())
    assert all(parameter.is_meta for parameter in built[0].network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("objective", [[], list(RECOMMENDED)])
@pytest.mark.parametrize(
    "strategy", [("", "ddp_spawn"), ("", "ddp"), (".class_path", "decm_lightning.training.strategies.FSDP2")]
)
def test_two_processes_train(strategy, objective, trained):
    argv = ["--trainer.devices", "2", f"--trainer.strategy{strategy[0]}", strategy[1], *objective]
    result = subprocess.run(
        [sys.executable, "-m", "decm_lightning", "fit", "--config", "config.yaml", *argv],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
