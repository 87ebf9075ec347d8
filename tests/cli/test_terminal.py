"""What fit and test show, in a terminal and in a log file."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
import yaml

from decm_lightning.networks import DiT, save

ROOT = Path(__file__).parents[2]
LAST = "runs/digits-decm/version_0/checkpoints/last.ckpt"
NOISE = ["-2", "Tip", "TPU", "GPU", "Epoch", "Testing", "Seed set", "UserWarning", "Test metric", "Modules in", "v_num"]
CODE = """
import sys
from decm_lightning import cli, progress
progress.SECONDS = 0.05
for words in (["fit"], ["test", "--ckpt_path", {last!r}]):
    sys.argv = ["decm", words[0], "--config", "config.yaml", *words[1:]]
    if code := cli.main():
        sys.exit(code)
"""


def prepare(folder: Path) -> list[str]:
    """Write a small config, and return the command that fits and tests it."""
    torch.manual_seed(0)
    save(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=10), folder / "teacher")
    config = yaml.safe_load((ROOT / "configs/digits/decm.yaml").read_text())
    config["trainer"] |= {"max_steps": 12, "val_check_interval": 6}
    specs = {"samples": 64, "test_samples": 64, "specs": ["student/mix/1"], "test_specs": ["student/mix/1"]}
    next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(".Evaluation"))["init_args"] |= specs
    config["model"]["init_args"]["teacher"]["init_args"]["path"] = "teacher"
    config["data"]["init_args"] |= {"batch_size": 16, "reference_size": 64}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-c", CODE.format(last=LAST)]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory) -> str:
    """Everything that is shown in a terminal of 120 columns."""
    folder = tmp_path_factory.mktemp("terminal")
    command = prepare(folder)
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    run = subprocess.Popen(command, cwd=folder, stdin=other, stdout=other, stderr=other)
    os.close(other)
    shown = b""
    # Reading fails when the process has ended.
    while chunk := _read(main):
        shown += chunk
    os.close(main)
    assert run.wait() == 0, shown.decode()
    return shown.decode()


def _read(file: int) -> bytes:
    try:
        return os.read(file, 1 << 16)
    except OSError:
        return b""


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> tuple[Path, str, str]:
    """The folder, standard output and standard error of a run without a terminal."""
    folder = tmp_path_factory.mktemp("log")
    run = subprocess.run(prepare(folder), cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout, run.stderr


def test_a_terminal_shows_one_summary_and_one_bar_over_all_steps(terminal):
    assert not [word for word in NOISE if word in terminal]
    assert re.findall(r"^cost +(\d\.\d\d) forward passes", terminal, re.M) == ["5.75"]
    (flops,) = re.findall(
        r"^FLOPs +([\d.]+) (.)FLOPs per forward pass of a sample, about [\d.]+ .FLOPs", terminal, re.M
    )
    assert float(flops[0]) > 0
    assert len(re.findall(r"^derivative +dual", terminal, re.M)) == 1
    assert re.search(r"training \|[^|]*\| \d+/12 steps", terminal)
    assert len(re.findall(r"expected: \d+ s", terminal)) == 1
    assert re.search(r"(sampling|student/mix/1) \|[^|]*\| \d+/64 images", terminal)
    assert terminal.count("| nfe | fd | kid ") == 1
    assert terminal.splitlines()[-1] == f"next: decm sample {LAST} --steps 4"


def test_a_log_file_has_plain_lines_with_step_speed_and_time_left(log):
    _, out, err = log
    assert not [word for word in NOISE if word in out + err]
    assert not re.search(r"[\r\x1b█]", out + err)
    lines = re.findall(r"^training (\d+)/12 steps, [\d.]+ (?:steps/s|s per step), \d+ \w+ left, loss [\d.]+", err, re.M)
    assert lines
    assert sorted(map(int, lines)) == [int(step) for step in lines]
    assert out.splitlines()[:3] == ["logged to runs/digits-decm/version_0", f"wrote {LAST}", out.splitlines()[2]]
    assert out.count("| nfe | fd | kid ") == 1


def test_a_test_writes_next_to_its_checkpoint_and_nowhere_else(log):
    folder, _, _ = log
    place = folder / LAST
    table = json.loads(place.with_name("last.quality.json").read_text())
    assert [row["steps"] for row in table["rows"]] == [1]
    assert {file.name for file in place.parent.glob("last.*")} == {
        "last.ckpt", "last.quality.json", "last.quality.md", "last.samples.png",
    }  # fmt: skip
    assert [path.name for path in (folder / "runs/digits-decm").iterdir()] == ["version_0"]
