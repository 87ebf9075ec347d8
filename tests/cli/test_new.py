"""decm new: from a folder of images to few-step samples in four commands, without YAML written by hand."""

import re
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from decm_lightning import cli
from decm_lightning.cli import new as command
from decm_lightning.cli.new_configs import Plan, student_config, teacher_config
from tests.data.photos import write_folder


@pytest.fixture
def decm(tmp_path, monkeypatch, capsys):
    """A function that runs one command next to a folder of 24 photos of 16 to 32 pixels: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(command, "STEPS", 4)
    write_folder(tmp_path / "photos", 24, side=16)

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["decm", *argv])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def test_four_commands_lead_from_a_folder_to_few_step_samples(decm, monkeypatch):
    # Of a process that never gets the CPU.
    monkeypatch.setattr(command, "time", SimpleNamespace(perf_counter=time.perf_counter, process_time=lambda: 0.0))
    code, out, err = decm("new", "photos", "--out", "my run", "--minutes", "1")
    assert code == 0, err
    assert "this machine is busy: a run gets 0% of a CPU" in out
    assert "24 images in 2 classes, 16 x 16 pixels, color" in out
    commands = [shlex.split(line, comments=True)[1:] for line in out.splitlines() if line.startswith("  decm ")]
    assert [words[0] for words in commands] == ["fit", "fit", "sample"]
    for words, name in zip(commands, ("teacher", "student", ""), strict=True):
        if name:
            file = Path(f"my run/{name}.yaml")
            text = re.sub(r"max_steps: &steps \d+", "max_steps: &steps 4", file.read_text())
            shown = [line for line in text.splitlines() if line.startswith("#     decm ")]
            assert [shlex.split(line)[2:] for line in shown] == [words]
            file.write_text(re.sub(r"every_n_steps: \d+", "every_n_steps: 2", text))
        code, out, err = decm(*words)
        assert code == 0, err
        if name:
            last = f"my run/{name}/checkpoints/last.ckpt"
            assert out.endswith(
                f"wrote {last}\nnext: decm sample '{last}'{' --steps 4' if name == 'student' else ''}\n"
            )
    # 10 columns, 5 for each class, and a row per spec.
    assert Image.open("my run/teacher/samples.png").size == (10 * 64, 64)
    assert Image.open("my run/student/samples.png").size == (10 * 64, 4 * 64)
    assert Image.open("my run/samples.png").size == (8 * 16 * 4, 2 * 16 * 4)


@pytest.fixture
def configs(decm, monkeypatch):
    """A function that runs decm new with steps of 0.5 and 1 s: (the two configs, out)."""
    monkeypatch.setattr(command, "_time_steps", lambda plan: (0.5, 1.0))

    def run(*argv):
        code, out, err = decm("new", "photos", *argv)
        assert code == 0, err
        return *(yaml.safe_load(Path(f"my-run/{name}.yaml").read_text()) for name in ("teacher", "student")), out

    return run


def arguments(config):
    return config["data"]["init_args"], config["model"]["init_args"]


def test_the_configs_say_what_is_trained_on(configs):
    teacher, student, _ = configs()
    data, model = arguments(teacher)
    assert (data["size"], data["channels"], data["batch_size"], data["held_out"]) == (16, 3, 16, 0.0)
    network = model["network"]["init_args"]
    assert (network["input_size"], network["in_channels"], network["num_classes"]) == (16, 3, 2)
    assert model["guidance"] == arguments(student)[1]["guidance"] == {"scale": 1.5}
    assert arguments(student)[1]["teacher"]["init_args"] == {"path": "my-run/teacher/checkpoints/last.ckpt"}
    assert arguments(student)[0] == data | {"reference_size": arguments(student)[0]["reference_size"]}
    assert "on_error" not in data


def test_one_class_of_gray_images_has_no_guidance(configs):
    shutil.rmtree("photos/flower")
    for file in Path("photos/china").iterdir():
        Image.open(file).convert("L").save(file)
    data, model = arguments(configs()[0])
    assert data["channels"] == 1
    assert (model["guidance"], model["class_dropout"]) == ({"scale": 1.0}, 0.0)
    assert model["network"]["init_args"]["num_classes"] == 1


def test_broken_and_small_images_are_left_out(configs):
    Path("photos/china/text.png").write_text("no image")
    Image.new("RGB", (4, 4)).save("photos/china/small.png")
    teacher, _, out = configs()
    assert arguments(teacher)[0]["on_error"] == "skip"
    assert arguments(teacher)[0]["size"] == 16
    assert "2 broken images: china/small.png" in out


def test_the_timed_runs_do_not_repeat_warnings(recwarn):
    with command._quiet():
        warnings.warn("1 broken image", stacklevel=1)
    assert not recwarn.list


def test_a_large_set_is_split(configs, monkeypatch):
    monkeypatch.setattr(command, "HELD_OUT_FROM", 24)
    assert arguments(configs()[0])[0]["held_out"] == 0.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("gone",), "gone"),
        (("photos", "--size", "18"), "size must be a multiple of 4: got 18"),
        (("photos", "--minutes", "0"), "minutes must be at least 1: got 0"),
        (("photos", "--size", "64"), "smaller than size 64"),
        (("empty",), "no image in empty"),
        (("tiny",), "too small: 3 pixels"),
        (("text",), "text.png"),
        (("photos", "--out", "done"), "done/teacher.yaml"),
    ],
)
def test_bad_input_is_one_line(argv, message, decm):
    for name in ("empty", "tiny", "text", "done"):
        Path(name).mkdir()
    Image.new("RGB", (3, 9)).save("tiny/a.png")
    Path("text/text.png").write_text("no image")
    Path("done/teacher.yaml").write_text("")
    code, _, err = decm("new", *argv)
    assert (code, err.splitlines()[-1][:13]) == (2, "decm: error: ")
    assert message in err.splitlines()[-1]


def plan(**options):
    values = {
        "folder": "photos", "out": Path("my-run"), "summary": "", "machine": "", "size": 64, "channels": 3,
        "classes": 2, "skips": False, "held_out": 0.0, "patch": 8, "scale": command.CPU,
        "batch_size": 32, "has_features": True,
    }  # fmt: skip
    return Plan(**(values | options))


@pytest.mark.parametrize("minutes", [5, 15, 300])
@pytest.mark.parametrize("step", [0.05, 0.5])
def test_measuring_takes_at_most_a_tenth_of_the_run(minutes, step):
    column = sample = step / 32 / 3 * 50
    length = command._length(plan(), minutes, step, column, sample)
    grids = length.steps // length.grid_every
    measuring = grids * command.COLUMNS * column + length.samples * (sample + 2 * command._features_time())
    assert 0 < measuring <= 0.1 * 60 * minutes
    assert 0.8 * 60 * minutes < length.steps * step + measuring <= 60 * minutes


def test_without_the_feature_network_no_distance_is_measured():
    length = command._length(plan(has_features=False), 15, 0.1, 0.1, 0.1)
    for text in (teacher_config(plan(has_features=False), length), student_config(plan(has_features=False), length)):
        names = [callback["class_path"] for callback in yaml.safe_load(text)["trainer"]["callbacks"]]
        assert not any("Evaluation" in name for name in names)
        assert "efficientnet" in text
    names = teacher_config(plan(), command._length(plan(), 15, 0.1, 0.1, 0.1))
    assert "decm_lightning.evaluation.Evaluation" in names
